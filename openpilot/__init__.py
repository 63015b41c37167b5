import sys

if sys.platform == "win32":
  raise SystemExit("error: Windows itself is not supported; run this inside WSL ('wsl --install' in PowerShell gives "
                   "it), where it is Linux")
