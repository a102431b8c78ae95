"""Translates nvcc's PTX, inline assembly included, into C++ for the simulator's runtime.

One C++ function a kernel: a register becomes a variable, an instruction a statement, a label a label. Shared memory is addressed
from 0, as on the GPU, through sim::shared_memory(). An opcode that is not in the tables below is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable

HEADER = """\
#include "cuda/device.cuh"

using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t; using s32 = int32_t; using s64 = int64_t;
using b16 = u16; using b32 = u32; using b64 = u64; using f32 = float; using pred = bool;

template <class To, class From> static To bits(From x) { static_assert(sizeof(To) == sizeof(From)); return std::bit_cast<To>(x); }
template <class T> static T load(const void* from) { T x; std::memcpy(&x, from, sizeof x); return x; }
template <class T> static void store(void* to, T x) { std::memcpy(to, &x, sizeof x); }
static char* shared(u64 address) { return reinterpret_cast<char*>(sim::shared_memory()) + address; }
static char* memory(u64 address) { return reinterpret_cast<char*>(address); }
static void block_barrier(int) { sim::block_barrier(); }
static void cp_async(u32 to, u64 from, int size, int read) {
  if (size != 16 || (read != 0 && read != 16)) std::abort();
  specdec::cp_async(shared(to), memory(from), read != 0);
}
template <class T> static void mma(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                                   float c0, float c1, float c2, float c3) {
  float c[4] = {c0, c1, c2, c3};
  specdec::mma(T{}, c, {a0, a1, a2, a3}, b0, b1);
  d0 = c[0], d1 = c[1], d2 = c[2], d3 = c[3];
}
template <class Load> static void ldmatrix(Load load, u32& r0, u32& r1, u32& r2, u32& r3, u32 address) {
  u32 r[4];
  load(r, shared(address));
  r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}
static u32 shuffle_butterfly(u32 value, u32 lane_mask, u32 clamp, u32 members) {
  if (clamp != 31) std::abort();
  return bits<u32>(sim::shuffle(members, bits<float>(value), sim::self()->lane ^ lane_mask));
}
static u32 insert_bits(u32 from, u32 to, u32 at, u32 count) {
  const u32 mask = count >= 32 ? ~0u : ((1u << count) - 1) << at;
  return (to & ~mask) | (from << at & mask);
}
static u32 funnel_left(u32 low, u32 high, u32 by) { return (u64{high} << 32 | low) << (by & 31) >> 32; }
static u32 funnel_right(u32 low, u32 high, u32 by) { return (u64{high} << 32 | low) >> (by & 31); }
"""

_TYPE = r"(pred|[busf]\d+)"
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_WIDE = {"s32": "s64", "u32": "u64"}


def _binary(operator: str) -> Callable[..., str]:
    return lambda d, a, b, *, type: f"{d} = {_as(type, a)} {operator} {_as(type, b)}"


def _call(function: str) -> Callable[..., str]:
    return lambda d, *operands, type: f"{d} = {function}({', '.join(_as(type, x) for x in operands)})"


def _as(type: str, operand: str) -> str:
    """Reads an operand as `type`; for an integer register only its sign can change, for an immediate also its width."""
    return operand if type in ("pred", "f32") and not _is_integer(operand) else f"static_cast<{type}>({operand})"


def _is_integer(operand: str) -> bool:
    return re.fullmatch(r"-?\d+|_rd?\d+", operand) is not None


def _unsigned(type: str) -> str:
    return type.replace("s", "u").replace("b", "u")


def _arithmetic(operator: str) -> Callable[..., str]:
    """Integers wrap around: computed without a sign."""
    return lambda d, a, b, *, type: _binary(operator)(d, a, b, type=_unsigned(type) if type != "f32" else type)


def _shift(operator: str) -> Callable[..., str]:
    def statement(d: str, a: str, b: str, *, type: str) -> str:
        width = int(type[1:])
        beyond = f"{_as(type, a)} >> {width - 1} " if type[0] == "s" else "0"
        return f"{d} = static_cast<u32>({b}) >= {width} ? {beyond} : {_as(type, a)} {operator} static_cast<u32>({b})"

    return statement


def _compare(relation: str, type: str) -> Callable[..., str]:
    if relation in _COMPARE:
        return lambda p, a, b: f"{p} = {_as(type, a)} {_COMPARE[relation]} {_as(type, b)}"
    inverse = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[relation]  # true for a NaN
    return lambda p, a, b: f"{p} = !({a} {inverse} {b})"


def _multiply_high(d: str, a: str, b: str, *, type: str) -> str:
    wide = _WIDE[type]
    return f"{d} = static_cast<{wide}>({_as(type, a)}) * static_cast<{wide}>({_as(type, b)}) >> 32"


def _multiply_wide(d: str, a: str, b: str, *, type: str) -> str:
    return f"{d} = static_cast<{_WIDE[type]}>({_as(type, a)}) * static_cast<{_WIDE[type]}>({_as(type, b)})"


def _multiply_add(d: str, a: str, b: str, c: str, *, type: str) -> str:
    unsigned = _unsigned(type)
    return f"{d} = {_as(unsigned, a)} * {_as(unsigned, b)} + {_as(unsigned, c)}"


def _convert(to: str, source: str) -> Callable[[str, str], str]:
    return lambda d, a: f"{d} = static_cast<{to}>({_as(source, a)})"


def _move(d: str, a: str, *, type: str) -> str:
    """Also between a float and its bits."""
    if type in ("b32", "b64") and not re.match(r"-|\d|reinterpret|sim::", a):
        return f"{d} = bits<decltype({d})>({a})"
    return f"{d} = {a}"


# Opcode -> statement of its operands. Groups of a pattern are handed to the factory.
_TYPED: dict[str, Callable[..., str]] = {
    "add": _arithmetic("+"), "sub": _arithmetic("-"), "mul": _binary("*"), "mul.lo": _arithmetic("*"),
    "and": _binary("&"), "or": _binary("|"), "xor": _binary("^"), "shl": _shift("<<"), "shr": _shift(">>"),
    "div": _binary("/"), "rem": _binary("%"), "div.rn": _binary("/"), "min": _call("min"), "max": _call("max"),
    "mul.hi": _multiply_high, "mul.wide": _multiply_wide, "mad.lo": _multiply_add, "fma.rn": _call("std::fma"),
    "mov": _move, "not": lambda d, a, *, type: f"{d} = !{a}" if type == "pred" else f"{d} = ~{_as(type, a)}",
    "neg": lambda d, a, *, type: f"{d} = -{_as(type, a)}", "abs": _call("std::fabs"),
    "copysign": lambda d, a, b, *, type: f"{d} = std::copysign({b}, {a})",  # PTX names the sign first
    "rcp.rn": lambda d, a, *, type: f"{d} = 1 / {a}", "rcp.approx.ftz": lambda d, a, *, type: f"{d} = 1 / {a}",
    "ex2.approx.ftz": _call("specdec::fast_exp2"),
    "selp": lambda d, a, b, p, *, type: f"{d} = {p} ? {_as(type, a)} : {_as(type, b)}",
    "bfi": _call("insert_bits"), "shf.l.wrap": _call("funnel_left"), "shf.r.wrap": _call("funnel_right"),
    "cvta.to.global": lambda d, a, *, type: f"{d} = {a}",
}  # fmt: skip

_WHOLE: dict[str, Callable[..., str]] = {
    "bra": lambda label: f"goto {label}",
    "bra.uni": lambda label: f"goto {label}",
    "ret": lambda: "return",
    "bar.sync": lambda barrier: f"block_barrier({barrier})",
    "cp.async.cg.shared.global": lambda to, source, size, read: f"cp_async({to}, {source}, {size}, {read})",
    "cp.async.commit_group": lambda: "specdec::cp_async_commit()",
    "cp.async.wait_group": lambda pending: f"specdec::cp_async_wait<{pending}>()",
    "cvt.rn.f16x2.f32": lambda d, high, low: f"{d} = specdec::pack(specdec::Half{{}}, {low}, {high})",
    "cvt.rn.bf16x2.f32": lambda d, high, low: f"{d} = specdec::pack(specdec::BFloat16{{}}, {low}, {high})",
    "cvt.rn.f32.s32": _convert("float", "s32"),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": lambda *x: f"mma<specdec::Half>({', '.join(x)})",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": lambda *x: f"mma<specdec::BFloat16>({', '.join(x)})",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": lambda *x: f"ldmatrix(specdec::ldmatrix, {', '.join(x)})",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": lambda *x: f"ldmatrix(specdec::ldmatrix_transposed, {', '.join(x)})",
    "shfl.sync.bfly.b32": lambda d, *x: f"{d.split('|')[0]} = shuffle_butterfly({', '.join(x)})",
}

_SPACES = {"global": "memory", "shared": "shared", "param": "memory"}
_SIZES = {"16": 2, "32": 4, "64": 8}


def _access(opcode: str, operands: list[str]) -> str | None:
    """ld and st, also of vectors."""
    match = re.fullmatch(rf"(ld|st)\.(?:(global|shared|param))(?:\.nc)?(?:\.(v[24]))?\.{_TYPE}", opcode)
    if not match:
        return None
    kind, space, _, type = match.groups()
    registers, address = (operands[:-1], operands[-1]) if kind == "ld" else (operands[1:], operands[0])
    places = [f"{_SPACES[space]}({address}) + {i * _SIZES[type[1:]]}" for i in range(len(registers))]
    if kind == "ld":
        return "; ".join(f"{register} = load<{type}>({place})" for register, place in zip(registers, places))
    return "; ".join(f"store<{type}>({place}, {_as(type, register)})" for register, place in zip(registers, places))


def _statement(opcode: str, operands: list[str]) -> str:
    if opcode in _WHOLE:
        return _WHOLE[opcode](*operands)
    if access := _access(opcode, operands):
        return access
    if match := re.fullmatch(rf"setp\.(\w+)\.{_TYPE}", opcode):
        return _compare(*match.groups())(*operands)
    if match := re.fullmatch(r"cvt\.([us]\d+)\.([us]\d+)", opcode):
        return _convert(*match.groups())(*operands)
    match = re.fullmatch(rf"(.+)\.{_TYPE}", opcode)
    if not match or match[1] not in _TYPED:
        raise NotImplementedError(f"PTX opcode {opcode} {', '.join(operands)}")
    return _TYPED[match[1]](*operands, type=match[2])


def _operand(text: str, symbols: dict[str, str]) -> str:
    """A register, an immediate, a special register, a symbol, or the inside of [...]."""
    text = text.strip()
    if text.startswith("["):
        return " + ".join(_operand(part, symbols) for part in text[1:-1].split("+"))
    if text in symbols:
        return symbols[text]
    if match := re.fullmatch(r"0f([0-9A-F]{8})", text):
        return f"bits<float>(0x{match[1]}u)"
    if match := re.fullmatch(r"%(tid|ctaid|nctaid)\.([xyz])", text):
        return {"tid": "threadIdx", "ctaid": "blockIdx", "nctaid": "gridDim"}[match[1]] + f".{match[2]}"
    if re.fullmatch(r"-?\d+", text):
        return text if -(2**31) < int(text) < 2**31 else f"{text}LL"
    return text.replace("%", "_").replace("$", "")


def _split(text: str) -> list[str]:
    """Operands of an instruction; {a, b} is two of them."""
    return [part for part in re.split(r"\s*,\s*", text.replace("{", "").replace("}", "").strip()) if part]


def _instruction(text: str, symbols: dict[str, str]) -> str:
    match = re.fullmatch(r"(?:@(!?)%(p\d+)\s+)?([\w.]+)\s*(.*)", text, re.S)
    if not match:
        raise NotImplementedError(f"PTX instruction {text!r}")
    negated, guard, opcode, operands = match.groups()
    statement = _statement(opcode, [_operand(part, symbols) for part in _split(operands)])
    return f"if ({negated}_{guard}) {{ {statement}; }}" if guard else f"{statement};"


def _registers(declaration: str) -> str:
    type, prefix, count = re.fullmatch(rf"\.reg \.{_TYPE}\s+%(\w+)<(\d+)>", declaration).groups()  # type: ignore[union-attr]
    return f"{_unsigned(type) if type[0] != 'p' else type} " + ", ".join(f"_{prefix}{i}" for i in range(1, int(count))) + ";"


def translate(ptx: str, kernel: str) -> str:
    """C++ source of one kernel, `extern "C" void ptx_<name>(void* arguments)`."""
    text = re.sub(r"//[^\n]*", "", ptx)
    symbols = dict.fromkeys(re.findall(r"\.extern \.shared .* (\w+)\[\];", text), "0")
    match = re.search(rf"\.entry {kernel}\([^)]*?(\w+)\[\d+\]\s*\)[^{{]*\{{(.*?)\n\}}", text, re.S)
    if not match:
        raise KeyError(f"{kernel} is not in the PTX")
    symbols[match[1]] = "reinterpret_cast<u64>(arguments)"
    lines = [HEADER, f'extern "C" void ptx_{kernel}(void* arguments) {{']
    for part in re.split(r"(?<=[;:])\s+", match[2].strip()):
        part = re.sub(r"\s+", " ", part.strip())
        if part.endswith(":"):
            lines.append(f"{part.replace('$', '')};")
        elif part.startswith(".reg"):
            lines.append(_registers(part[:-1]))
        elif part and not part.startswith(".pragma"):
            lines.append(_instruction(part[:-1], symbols))
    return "\n".join([*lines, "}"])
