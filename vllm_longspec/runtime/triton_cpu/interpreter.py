"""Triton's interpreter with less work around each operation.

An interpreted operation is a numpy call of microseconds inside a hundred of Python: types that are
made again, overflow checks whose result Triton reads with `debug` only, and, at every call of a
kernel's helper, hundreds of functions of `triton.language` looked through that already are what the
interpreter wants. What is computed stays what it was; what is replaced here returns what Triton's
own returns. Where a Triton is not as expected, its own stays.
"""

import dataclasses
from typing import Any


def lighten_interpreter() -> None:
    """Idempotent. To be called only where kernels are interpreted."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_lightened", False):
        return
    interpreter._lightened = True
    for lighten in (
        _without_unread_checks, _patched_once, _known_numpy_dtypes, _known_types, _same_shapes,
    ):  # fmt: skip
        try:
            lighten(interpreter)
        except (AssertionError, AttributeError, TypeError):  # then it is only slower
            continue


def _without_unread_checks(interpreter: Any) -> None:
    """Each sum, difference and product of integers is also computed in int64 and compared with the
    type's limits, for `device_assert`, which does nothing without `debug`."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        options = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = options


def _patched_once(interpreter: Any) -> None:
    """A helper is called in a kernel, for which `triton.language` was patched."""
    tl, patch_lang = interpreter.tl, interpreter._patch_lang
    is_builtin, empty_scope = tl.core.is_builtin, interpreter._LangPatchScope
    # What a kernel's module may know `triton.language` as, and a function of each part that is
    # patched with it.
    always = [(tl.tensor, "__add__"), (tl.core.tensor_descriptor_base, "load")]
    parts = {tl: [(tl, "load"), (tl.math, "exp"), *always], tl.core: [(tl.core, "load"), *always]}
    assert all(hasattr(*one) for samples in parts.values() for one in samples)
    of_function: dict[Any, list[tuple[Any, str]]] = {}

    def patch_what_is_not(fn: Any) -> Any:
        samples = of_function.get(fn)
        if samples is None:
            known = {id(value) for value in fn.__globals__.values()}
            samples = [one for module in parts if id(module) in known for one in parts[module]]
            of_function[fn] = samples
        if samples and not any(is_builtin(getattr(*one)) for one in samples):
            return empty_scope()
        return patch_lang(fn)

    interpreter._patch_lang = patch_what_is_not


def _known_numpy_dtypes(interpreter: Any) -> None:
    numpy_dtype = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        found = known.get(name)
        if found is None:
            found = known[name] = numpy_dtype(dtype)
        return found

    interpreter._get_np_dtype = get_np_dtype


def _known_types(interpreter: Any) -> None:
    """Shapes, which are powers of two, are few, and nothing changes them."""
    core = interpreter.tl.core
    constexpr, block_type = core.constexpr, core.block_type
    init_type, init_tensor = block_type.__init__, core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def init_known_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if type(size) is constexpr else size for size in shape])
        found = shapes.get(sizes)
        if found is None:
            init_type(self, element_ty, shape)
            shapes[sizes] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, written = found
        self.name = f"<{written}, {element_ty}>"

    of_shapes: dict[int, tuple[Any, Any]] = {}
    of_scalars: list[Any] = []

    def init_known_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        # By identity: `shapes` keeps them.
        known = of_shapes.get(id(type.shape)) if type.is_block() else (of_scalars or None)
        if known is not None:
            self.shape, self.numel = known
            return
        init_tensor(self, handle, type)
        if not type.is_block():
            of_scalars[:] = self.shape, self.numel
        elif any(type.shape is kept for kept, *_ in shapes.values()):
            of_shapes[id(type.shape)] = self.shape, self.numel

    block_type.__init__, core.tensor.__init__ = init_known_type, init_known_tensor


def _same_shapes(interpreter: Any) -> None:
    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block():
            same = rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        else:
            same = not rhs.type.is_block()
        return (lhs, rhs) if same else broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value
