"""What Grounding DINO is asked for: a phrase for each class, laid into one prompt or several, and the way back from its
scores of tokens to scores of classes.

Scores are never read off merged phrases: of "car. traffic light." that text may be 'car traffic', two classes, or
'light', half of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.lib.errors import UserError, printable, warn

SPECIAL = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # the network has these numbers in its code
UNKNOWN = 100  # [UNK], of every word that the vocabulary cannot spell
TOKENS = 256  # of a prompt; more is an error of shapes inside
VOCABULARY = "google-bert/bert-base-uncased"  # whose tokens all published sizes read


def has_tokenizer(folder: Path) -> bool:
  return any((folder / f).is_file() for f in ("tokenizer.json", "vocab.txt"))


def load_tokenizer(folder: Path) -> Any:
  """BERT's, from a folder with tokenizer.json or vocab.txt. Raises UserError where it is none, or not the one that the
  network's code has in mind."""
  from transformers import BertTokenizer

  if not has_tokenizer(folder):
    raise UserError(
      f"no tokenizer.json or vocab.txt in {folder}, which prompts need; copy the whole folder, or name one that has it "
      "with --tokenizer"
    )
  try:
    found = BertTokenizer.from_pretrained(folder, local_files_only=True)
    numbers = dict(zip(SPECIAL, found.convert_tokens_to_ids(list(SPECIAL)), strict=True))
  except Exception as e:  # anything, on a file that is none
    raise UserError(f"the tokenizer in {folder} does not load: {printable(e, 160)}; copy the whole folder") from None
  if numbers != SPECIAL:
    raise UserError(f"the tokenizer in {folder} is not BERT's: it has {numbers}, Grounding DINO {SPECIAL}")
  return found


def phrase_of(name: str) -> str:
  """A class's name as a phrase: small letters, without the marks that end one."""
  return " ".join(name.lower().replace(".", " ").replace("?", " ").split())


@dataclass(frozen=True)
class Prompt:
  classes: tuple[int, ...]  # indices of all classes, in the order of their phrases
  text: str
  ids: tuple[int, ...]  # tokens


@dataclass(frozen=True)
class Prompts:
  """names: the classes. phrases: what is said for each. negatives: phrases after those of the classes, of things that
  are none of them: what looks more like one of these is nothing."""

  names: tuple[str, ...]
  phrases: tuple[str, ...]
  negatives: tuple[str, ...]
  all: tuple[Prompt, ...]

  def settings(self) -> dict[str, Any]:
    return {"classes": list(self.names), "prompts": [p.text for p in self.all], "negatives": list(self.negatives)}


def parse_prompts(said: Sequence[str], names: Sequence[str]) -> dict[str, str]:
  """--prompt CLASS=TEXT, ... -> {class: text}. Raises UserError on a class that is none."""
  out = {}
  for item in said:
    name, equals, text = item.partition("=")
    if not equals or name not in names:
      raise UserError(f"--prompt {item}: write CLASS=TEXT, with one of the classes {', '.join(names)}")
    out[name] = text
  return out


def check_tokens(tokenizer: Any, phrases: Sequence[str]) -> None:
  """The tokenizer takes accents off, and has one token for all words that it does not know: other words may be the same
  to the network. Raises UserError on two such phrases; warns of one without a known word."""
  seen: dict[tuple[int, ...], str] = {}
  for phrase in phrases:
    ids = tuple(tokenizer(phrase)["input_ids"])[1:-1]
    if (same := seen.setdefault(ids, phrase)) != phrase:
      raise UserError(
        f"'{printable(phrase, 40)}' and '{printable(same, 40)}' are the same words to Grounding DINO, which reads "
        "English without accents; tell the classes apart with --prompt CLASS=TEXT"
      )
    if set(ids) <= {UNKNOWN}:
      warn(
        f"Grounding DINO knows no word of '{printable(phrase, 40)}': it finds what it learns here at most; name it in "
        "English with --prompt CLASS=TEXT"
      )


def make_prompts(
  tokenizer: Any,
  names: Sequence[str],
  said: Mapping[str, str] | None = None,
  negatives: Sequence[str] = (),
  each: bool = False,
  most: int = TOKENS,
) -> Prompts:
  """said: phrases of some classes; the others are called by their names. each: a prompt for every class. Where one
  prompt has more than `most` tokens, it is split. Raises UserError on phrases that cannot be told apart."""
  said = said or {}
  phrases = [phrase_of(said.get(n, n)) for n in names]
  more = [phrase_of(n) for n in negatives]
  for name, phrase in zip([*names, *negatives], [*phrases, *more], strict=True):
    if not phrase:
      raise UserError(f'the class \'{printable(name, 40)}\' has no word to ask for; give --prompt "{name}=..."')
  for i, phrase in enumerate([*phrases, *more]):
    if phrase in [*phrases, *more][:i]:
      raise UserError(f"'{printable(phrase, 40)}' is asked for twice; tell the classes apart with --prompt CLASS=TEXT")
  check_tokens(tokenizer, [*phrases, *more])

  def build(classes: Sequence[int]) -> Prompt:
    text = ". ".join([*(phrases[c] for c in classes), *more]) + "."
    return Prompt(tuple(classes), text, tuple(tokenizer(text)["input_ids"]))

  groups: list[list[int]] = [[c] for c in range(len(names))] if each else [[]]
  if not each:
    for c in range(len(names)):
      if groups[-1] and len(build([*groups[-1], c]).ids) > most:
        groups.append([])
      groups[-1].append(c)
  out = Prompts(tuple(names), tuple(phrases), tuple(more), tuple(build(g) for g in groups if g))
  for p in out.all:
    if len(p.ids) > most:
      raise UserError(
        f"the prompt '{printable(p.text, 60)}' is of {len(p.ids)} tokens; at most {most}: take shorter or fewer phrases"
      )
    if len(label_map(p.ids)) != len(p.classes) + len(more):
      raise UserError(f"the phrases of '{printable(p.text, 80)}' are not told apart; a phrase is words without marks")
  return out


def label_map(ids: Sequence[int], width: int = TOKENS) -> Tensor:
  """A prompt's tokens -> (phrases, width) of 0 and 1: which tokens are of which phrase, by the official rule."""
  from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

  tokens: Any = torch.tensor([list(ids)])
  return build_label_maps(torch.empty(1, 1, width), tokens)[0]


def class_scores(logits: Tensor, ids: Sequence[int]) -> Tensor:
  """(..., width) logits of tokens -> (..., phrases) probabilities: the mean over a phrase's tokens, as the official
  evaluation has it."""
  maps = label_map(ids, logits.shape[-1]).to(logits.device, torch.float32)
  return logits.float().sigmoid() @ (maps / maps.sum(-1, keepdim=True)).T


def token_batch(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
  """input_ids, attention_mask, token_type_ids, (B, L) each."""
  longest = max(len(p.ids) for p in prompts)
  ids = torch.zeros(len(prompts), longest, dtype=torch.long)
  mask = torch.zeros_like(ids)
  for i, p in enumerate(prompts):
    ids[i, : len(p.ids)], mask[i, : len(p.ids)] = torch.tensor(p.ids), 1
  return {
    "input_ids": ids.to(device),
    "attention_mask": mask.to(device),
    "token_type_ids": torch.zeros_like(ids).to(device),
  }
