"""The design note's flags as our commands have them: --model and --images before what is positional here, --gpu N."""

import os
from collections.abc import Sequence


def in_our_words(argv: Sequence[str], positional: Sequence[str] = ()) -> list[str]:
  """argv: without the program. positional: flags whose values come first here, in this order; several values may follow
  one. --gpu N is said to CUDA, by its environment."""
  first: dict[str, list[str]] = {}
  rest: list[str] = []
  words = list(argv)
  while words:
    word = words.pop(0)
    flag, equals, value = word.partition("=")
    if flag == "--gpu":
      os.environ["CUDA_VISIBLE_DEVICES"] = value if equals else words.pop(0) if words else ""
    elif flag in positional:
      own = [value] if equals else []
      while not equals and words and not words[0].startswith("--"):
        own.append(words.pop(0))
      first.setdefault(flag, []).extend(own)
    else:
      rest.append(word)
  return [*(v for f in positional for v in first.get(f, ())), *rest]
