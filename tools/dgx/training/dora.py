"""DoRA by the names of this folder's notes; what it is made of is in tools/learn/adapters."""

from openpilot.tools.learn.adapters.apply import (
  adapter_parameters as adapter_parameters,
  apply_dora as apply_dora,
  merge as merge,
  set_adapter as set_adapter,
  unload as unload,
  unmerge as unmerge,
)
from openpilot.tools.learn.adapters.files import load_adapter as load_adapter, save_adapter as save_adapter
from openpilot.tools.learn.adapters.layers import (
  DoRAConv2d as DoRAConv2d,
  DoRAGRU as DoRAGRU,
  DoRALayer as DoRALayer,
  DoRALinear as DoRALinear,
)
