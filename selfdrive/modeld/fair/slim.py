"""What a captured tinygrad jit needs to run, and no more: reading it was most of a start. Imported where tinygrad's
settings are in the environment.

Everything here is checked by who writes the result: read back, it must compute the same bits as the jit that was
captured (compile.py), and where a tinygrad has not what this needs, its import or a call fails and the jit is written
as it is."""

from dataclasses import replace
from typing import Any

from tinygrad import Tensor
from tinygrad.device import Buffer, Device, TinyELF
from tinygrad.dtype import dtypes
from tinygrad.uop.ops import Ops, UOp, buffers

BLOCK = 256  # bytes; where weights begin, as tinygrad's memory planner does it for what lies between layers


def with_own_numbers(jit: Any, first: int) -> Any:
  """The same jit, its buffers numbered from `first`.

  tinygrad knows a buffer by a number that each process counts from 0, and one that is read back while a process has
  another of that number and shape is taken for it: the second network would run with the first one's weights."""
  captured = jit.captured
  mine: dict[UOp, UOp] = {}
  for root in (captured._linear, *(t.uop for t in captured.ret.values())):
    for u in root.toposort():
      if u.op is Ops.BUFFER and u not in mine and isinstance(u.device, str):
        mine[u] = numbered(u, first + len(mine), buffers.get(u))
  ret = {k: Tensor(t.uop.substitute(mine)) for k, t in captured.ret.items()}
  return rebuilt(jit, captured._linear.substitute(mine, walk=True, enter_calls=True), ret)


def slim(jit: Any) -> Any:
  """The same jit without what kernels were made of (their loops, their source), all weights in one buffer, and what
  lies between layers as views that are cut
  already: tinygrad would find each of them by rewriting its expression."""
  captured = jit.captured
  found = sorted(
    (u for u in captured._linear.toposort() if u.op is Ops.BUFFER and isinstance(u.device, str)),
    key=lambda u: u.arg.slot,
  )
  number = found[-1].arg.slot + 1
  done: dict[UOp, UOp] = {}
  offset, weights = 0, []
  for u in found:
    b = buffers.get(u)
    if isinstance(b, Buffer) and b.is_allocated() and b._base is None:
      weights.append((u, b, offset))
      offset += -(-b.nbytes // BLOCK) * BLOCK
  if weights and len({b.device for _, b, _ in weights}) == 1:
    data = bytearray(offset)
    for _, b, at in weights:
      data[at : at + b.nbytes] = b.as_memoryview()
    arena = Buffer(weights[0][1].device, offset, dtypes.uint8, initial_value=bytes(data))
    for u, b, at in weights:
      done[u] = numbered(u, number, arena.view(b.size, b.dtype, at).ensure_allocated())
      number += 1

  def light(u: UOp) -> UOp:
    nonlocal number
    if u not in done:
      src = u.src
      if u.op is Ops.PROGRAM:
        kernel, lines, text, binary = src
        src = (
          kernel.replace(src=()),
          lines.replace(src=tuple(p for p in lines.src if p.op is Ops.PARAM)),
          text.replace(arg=""),
          binary,
        )
      elif u.op in (Ops.LINEAR, Ops.CALL, Ops.CUSTOM_FUNCTION):
        src = tuple(light(s) for s in src)
      elif u.op in (Ops.BITCAST, Ops.SHRINK) and u.buf_uop.op is Ops.BUFFER and isinstance(u.device, str):
        done[u] = numbered(UOp.new_buffer(u.device, u.max_numel(), u.dtype, num=number), number, u.buffer)
        number += 1
        return done[u]
      done[u] = u.replace(src=src)
    return done[u]

  return rebuilt(jit, light(captured._linear), captured.ret)


def rebuilt(jit: Any, linear: UOp, ret: dict[str, Tensor]) -> Any:
  captured = jit.captured
  return type(jit)(None, type(captured)(ret, linear, captured.expected_names, captured.expected_input_info))


def device_programs() -> dict[str, TinyELF]:
  """By name the small programs that tinygrad's CPU device compiles when it is opened; none where it is not open. See
  read_jit()."""
  if "CPU" not in Device._opened_devices:
    return {}
  from tinygrad.runtime.ops_cpu import CPUDevice, ClangRenderer, KernelInfo, do_to_program

  device = Device["CPU"]
  assert isinstance(device, CPUDevice)
  clang = ClangRenderer(replace(device.renderer.target, renderer="CLANG"))
  return {f.__name__: do_to_program(f().sink(arg=KernelInfo(f.__name__), tag=1), clang).to_elf() for f in device.prgs}


def numbered(u: UOp, number: int, b: Any) -> UOp:
  """The BUFFER u by another number, with memory b where there is some."""
  new = u.replace(arg=replace(u.arg, slot=number))
  if b is not None:
    buffers[new] = b.ref(1)
  return new
