"""The feature flag: FairEnabled, and the bundle that fairmodeld runs, FairBundle. A running manager follows within a
second."""

import argparse
import sys
from collections.abc import Callable, Sequence

from openpilot.selfdrive.modeld.fair.bundle import DEFAULT, MODELS_DIR, BundleError, bundle_path, find_bundle
from openpilot.selfdrive.modeld.fair.ipc import Params, UnknownKeyName


def put(params: Params, key: str, value: bool | str) -> None:
  """Writes before it returns, whatever the checkout's age: since 2026 Params writes later, unless it is told to
  wait."""
  write: Callable[..., None] = params.put_bool if isinstance(value, bool) else params.put
  try:
    write(key, value, block=True)
  except TypeError:
    write(key, value)


def status(params: Params) -> str:
  name = params.get("FairBundle")
  name = name.decode() if isinstance(name, bytes) else name
  try:
    bundle = bundle_path(name, MODELS_DIR).name + ("" if name else " (none is chosen)")
  except BundleError as e:
    bundle = f"none: {e}"
  return (
    f"FairEnabled {'on' if params.get_bool('FairEnabled') else 'off'}, bundle {bundle}, in {params.get_param_path()}"
  )


def main(argv: Sequence[str] = ()) -> int:
  p = argparse.ArgumentParser(prog="flag", description=__doc__)
  p.add_argument("state", choices=["on", "off", "status"])
  p.add_argument("--bundle", help=f"a bundle's name in models/; '' for {DEFAULT}, or the first there")
  args = p.parse_args(list(argv))
  try:
    params = Params()
    if args.bundle:
      put(params, "FairBundle", find_bundle(args.bundle, MODELS_DIR).path.name)
    elif args.bundle is not None:
      params.remove("FairBundle")
    if args.state != "status":
      put(params, "FairEnabled", args.state == "on")
    print(status(params))
  except (BundleError, OSError) as e:  # OSError: the params' folder cannot be made or written
    print(f"error: {e}", file=sys.stderr)
    return 2
  except UnknownKeyName as e:
    print(f"error: this build does not know the param {e}: lay the overlay and build again (scons)", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))
