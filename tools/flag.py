#!/usr/bin/env python3
"""The feature flag: FairEnabled, and the bundle that fairmodeld runs, FairBundle. A running manager follows within a second."""
import argparse

from openpilot.common.params import Params
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, find_bundle
from openpilot.tools.lib.errors import cli


def main() -> None:
  p = argparse.ArgumentParser(prog="flag", description=__doc__)
  p.add_argument("state", choices=["on", "off", "status"])
  p.add_argument("--bundle", help="a bundle's name in models/; '' for the first there")
  args = p.parse_args()
  params = Params()
  if args.bundle is not None:
    if args.bundle:
      params.put("FairBundle", find_bundle(args.bundle, MODELS_DIR).name)
    else:
      params.remove("FairBundle")
  if args.state != "status":
    params.put_bool("FairEnabled", args.state == "on")
  bundle = params.get("FairBundle") or "the first in models/"
  print(f"FairEnabled {'on' if params.get_bool('FairEnabled') else 'off'}, bundle {bundle}, in {params.get_param_path()}")


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())
