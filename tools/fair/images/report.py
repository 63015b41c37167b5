"""What a data set of labeled pictures holds, as JSON and as text."""

from collections import Counter
from pathlib import Path
from typing import Any

from openpilot.tools.fair.images.check import Checked, ident
from openpilot.tools.fair.images.dataset import Dataset
from openpilot.tools.fair.images.families import select_student_model
from openpilot.tools.fair.labels.sources.pictures import plain_name
from openpilot.tools.lib.errors import printable
from openpilot.tools.lib.files import LONG
from openpilot.tools.lib.said import command

LISTED = 40  # classes
NOT_STATED = "not stated"
TEACHERS = {"boxes": "Grounding DINO", "masks": "SAM"}


def settle_licenses(found: Checked, given: str) -> dict[str, int]:
  """Licenses -> pictures under each. given: of those that name none; it is written into the data. A license's id is
  made that of its entry."""
  entries = {k: x for x in found.licenses if (k := ident(x.get("id"))) is not None}
  names = {k: printable(x.get("name") or x.get("url") or "", LONG) for k, x in entries.items()}
  own: Any = None
  if given:
    taken = [x["id"] for x in entries.values() if isinstance(x["id"], int)]
    own = next((x["id"] for k, x in entries.items() if names[k] == given), None)
    if own is None:
      own = max(taken, default=0) + 1
  used: Counter[str] = Counter()
  for p in found.pictures:
    key = ident(p.entry.get("license")) or ""
    if names.get(key):
      p.entry["license"] = entries[key]["id"]
      used[names[key]] += 1
    elif given:
      p.entry["license"] = own
      used[given] += 1
    else:
      p.entry.pop("license", None)
      used[NOT_STATED] += 1
  if used[given] and own not in [x.get("id") for x in found.licenses]:
    found.licenses.append({"id": own, "name": given, "url": ""})
  return {k: n for k, n in used.most_common() if n}


def report(data: Dataset, found: Checked, licenses: dict[str, int]) -> dict[str, Any]:
  total = len(found.annotations)
  per_class = Counter(a["category_id"] for a in found.annotations)
  on = Counter(c for _, c in {(a["image_id"], a["category_id"]) for a in found.annotations})
  kinds = [k for k, n in (("boxes", found.boxes), ("masks", found.masks)) if n]
  return {
    "data": str(data.path),
    "format": data.kind,
    "images": {"folder": str(data.folder), "listed": found.listed, "found": len(found.pictures)},
    "annotations": {
      "listed": len(data.annotations),
      "used": total,
      "boxes": found.boxes,
      "masks": found.masks,
      "boxes_and_masks": found.both,
      "boxes_from_masks": found.made_boxes,
      "keypoints_ignored": found.keypoints,
      "crowds": found.crowds,
    },
    "pictures_without_labels": len(found.pictures) - len({a["image_id"] for a in found.annotations}),
    "classes": [
      {"id": c["id"], "name": c["name"], "instances": per_class[c["id"]], "images": on[c["id"]]}
      for c in found.categories
    ],
    "licenses": licenses,
    "problems": data.problems.to_dict(),
    "teachers": [TEACHERS[k] for k in kinds],
    "student": select_student_model({"has_boxes": True, "has_masks": found.masks}),
  }


def share(n: int, total: int) -> str:
  return f"{n} ({n / max(total, 1):.0%})"


def lines_of(r: dict[str, Any], problems: list[str]) -> list[str]:
  a, images = r["annotations"], r["images"]
  shares = f"boxes {share(a['boxes'], a['used'])}, masks {share(a['masks'], a['used'])}"
  out = [
    f"{printable(r['data'], LONG)}: {r['format']}",
    f"pictures     {images['found']} of {images['listed']} can be used, in {printable(images['folder'], LONG)}",
    f"             {r['pictures_without_labels']} without a label",
    f"annotations  {a['used']} of {a['listed']} can be used: " + shares,
  ]
  if a["boxes_from_masks"]:
    out.append(f"             {a['boxes_from_masks']} boxes are made from masks, one tight box each")
  if a["keypoints_ignored"]:
    out.append(f"             key points of {a['keypoints_ignored']} are ignored")
  classes = sorted(r["classes"], key=lambda c: -c["instances"])
  out.append(f"classes      {len(classes)}: id, name, labels, pictures")
  wide = max(len(printable(c["name"], 40)) for c in classes[:LISTED])
  for c in classes[:LISTED]:
    out.append(f"  {c['id']:>6}  {printable(c['name'], 40):{wide}}  {c['instances']:>7}  {c['images']:>7}")
  if len(classes) > LISTED:
    more = classes[LISTED:]
    out.append(f"  and {len(more)} more with {sum(c['instances'] for c in more)} labels; --json has all")
  out.append("licenses     " + ", ".join(f"{k}: {n} pictures" for k, n in r["licenses"].items()))
  out.append(f"problems     {'none' if not problems else ''}".rstrip())
  out += [f"  - {p}" for p in problems]
  kinds = {"Grounding DINO": "boxes", "SAM": "masks"}
  teachers = " and ".join(f"{t} ({kinds[t]})" for t in r["teachers"])
  out.append(f"teachers     {teachers}; `images train-teacher` tunes them on your data")
  if r["teachers"] == ["SAM"]:
    out.append("             Grounding DINO fits too, by the boxes that are made from masks")
  out.append(
    f"student      {r['student']} ({'boxes and masks' if a['masks'] else 'boxes'}), which learns from the labels"
  )
  return out


def next_commands(r: dict[str, Any], files: dict[str, Path]) -> list[str]:
  """Commands that can be typed. files: {part: COCO JSON}, or the data itself under ''."""
  base = plain_name(Path(r["images"]["folder"]).resolve().name)
  if base in ("images", "pictures"):
    base = plain_name(Path(r["images"]["folder"]).resolve().parent.name)
  first, *others = files
  val, test = (next((p for p in others if p.startswith(k)), None) for k in ("val", "test"))
  own = r["format"] != "COCO JSON" and files[first] == Path(r["data"])
  images: list[str | Path] = [] if own else ["--images", r["images"]["folder"]]
  held_out: list[str | Path] = ["--val", files[val]] if val else []
  data: list[str | Path] = ["--data", files[first], *held_out, *images]
  judge: list[str | Path] = ["--data", files[test or val or first], *images]
  teachers = f"out/{base}-teachers"
  oriented = r["format"] == "DOTA folder"
  words: list[list[str | Path]] = [
    ["train-obb" if oriented else "train-student", *data, "--output", f"out/{base}"],
    ["evaluate", f"out/{base}", *judge],
  ]
  words += (
    ()
    if oriented
    else [  # or by teachers
      ["train-teacher", *data, "--output", teachers],
      ["train-student", *data, "--teacher-dir", teachers, "--output", f"out/{base}-taught"],
    ]
  )
  return [command("tools/op.sh", "images", *w) for w in words]
