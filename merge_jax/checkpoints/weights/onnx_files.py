"""ONNX: initialisers and constants of a graph; their operations determine the matrix specs."""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from merge_jax.checkpoints.names import check_inside, paths_of
from merge_jax.checkpoints.weights.stored import Format, Stored, needing, reading
from merge_jax.layouts import MatrixSpec
from merge_jax.paths import some_of

__all__ = ["ONNX"]

_IR_VERSION, _LARGEST_VERSION = 0x08, 0x20  # The first field of a model, an integer below this.
_BLOCKED = "com.microsoft.nchwc"
_FACTOR = re.compile(r"/.*Constant(_\d+)?_output_\d+")
_SECOND = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)  # The fields that may follow.


def _detect(path: Path, head: bytes) -> bool:
    del path
    return len(head) > 2 and head[0] == _IR_VERSION and head[1] < _LARGEST_VERSION and head[2] in _SECOND


def _open(path: Path) -> Stored:
    try:
        import onnx  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise needing(path, "onnx", "onnx") from None
    with reading(path, "model of ONNX"):
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        inner = [function.node for function in model.functions]
        constants = list(_constants(graph.node, onnx.helper, path))
        tensors: dict[str, Any] = {}
        for name, tensor in [*((tensor.name, tensor) for tensor in graph.initializer), *constants]:
            if not isinstance(name, str):  # Bytes, if not text.
                raise ValueError(f"{path} has the name {name!r}, which is no text")
            if name in tensors:
                raise ValueError(f"{path} has the name {name!r} twice")
            tensors[name] = tensor
            for entry in tensor.external_data:
                if entry.key == "location":
                    check_inside(entry.value, path, "file of weights")
                    if not (path.parent / entry.value).is_file():
                        raise FileNotFoundError(
                            f"{path} keeps {name!r} in {path.parent / entry.value}, which is missing: move it there."
                            " If onnx saved this model twice, only the first save has the numbers"
                        )
        for node in graph.node:  # A PyTorch exporter stores equal tensors once, and the others' names this way.
            if node.op_type == "Identity" and node.input[0] in tensors and not node.output[0].startswith("/"):
                if node.output[0] in tensors:
                    raise ValueError(f"{path} has the name {node.output[0]!r} twice")
                tensors[node.output[0]] = tensors[node.input[0]]
        if graph.sparse_initializer:
            raise ValueError(f"{path} has sparse initialisers, which are not read: make them dense before the export")
        blocked = [name for node in graph.node if node.domain == _BLOCKED for name in node.input if name in tensors]
        if blocked:
            raise ValueError(
                f"{path} has {some_of(map(repr, blocked), 3)} in blocks of channels, as ONNX Runtime optimises a"
                " model for a machine: give the model before that, or write it with graph_optimization_level ="
                " ORT_ENABLE_EXTENDED"
            )
        inside = [name for nodes in (graph.node, *inner) for name in _inside(nodes, onnx.helper, path)]
        inside += [name for nodes in inner for name, _ in _constants(nodes, onnx.helper, path)]
    if inside:
        warnings.warn(
            f"{path} has the tensors {some_of(map(repr, inside), 5)} in branches, loops or functions of its graph: they"
            " are not read",
            stacklevel=5,
        )
    if not tensors:
        raise ValueError(
            f"{path} has no initialisers and no constants that are weights: the model was exported without its"
            " parameters"
        )
    leaves = {leaf: name for name, leaf in _paths(tensors, path).items()}

    def shapes(paths: Sequence[str]) -> Mapping[str, jax.ShapeDtypeStruct]:
        found = {}
        for leaf in paths:
            tensor = tensors[leaves[leaf]]
            with reading(path, "model of ONNX"):
                dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            if dtype.hasobject:
                raise ValueError(f"{path} has texts in {leaves[leaf]!r}: leave it out with select")
            if any(size < 0 for size in tensor.dims):
                raise ValueError(f"{path} claims the shape {list(tensor.dims)} for {leaves[leaf]!r}")
            found[leaf] = jax.ShapeDtypeStruct(tuple(tensor.dims), dtype)
        return found

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        shapes(paths)
        with reading(path, "model of ONNX"):
            return {leaf: numpy_helper.to_array(tensors[leaves[leaf]], str(path.parent)) for leaf in paths}

    specs = {}
    for name, spec in _specs(graph, {name: len(tensor.dims) for name, tensor in tensors.items()}):
        # If two operations read a tensor differently, its spec is unknown.
        specs[name] = spec if specs.get(name, spec) == spec else None
    known = {leaf: specs[name] for leaf, name in leaves.items() if specs.get(name) is not None}
    return Stored(tuple(leaves), shapes, read, known, names_tell=False)


def _constants(nodes: Iterable[Any], helper: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the name and tensor of each `Constant` that may be a weight: not a scalar or an integer vector.

    Those are shapes, axes and factors of operations, as are single numbers under names generated by PyTorch.
    """
    for node in nodes:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "sparse_value":
                raise ValueError(f"{path} has the sparse constant {node.output[0]!r}, which is not read: make it dense")
            tensor = attribute.t
            if attribute.name == "value_floats":
                tensor = helper.make_tensor("", 1, [len(attribute.floats)], attribute.floats)  # 1: float32.
            elif attribute.name != "value":
                continue
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            is_factor = math.prod(tensor.dims) == 1 and _FACTOR.fullmatch(node.output[0])
            if not dtype.hasobject and len(tensor.dims) > (dtype.kind in "iub") and not is_factor:
                yield node.output[0], tensor


def _inside(nodes: Iterable[Any], helper: Any, path: Path) -> Iterator[str]:
    """Yields the names of initialisers and constants in the subgraphs of branches and loops."""
    for node in nodes:
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from (tensor.name for tensor in graph.initializer)
                yield from (name for name, _ in _constants(graph.node, helper, path))
                yield from _inside(graph.node, helper, path)


def _paths(names: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Returns the path of each name; names generated by an exporter begin with a slash."""
    stripped = {name.lstrip("/"): name for name in names}
    if len(stripped) < len(names):
        raise ValueError(f"{path} has two tensors whose names differ only in a slash before them")
    return {stripped[bare]: leaf for bare, leaf in paths_of(stripped, path).items()}


def _specs(graph: Any, ranks: Mapping[str, int]) -> Iterator[tuple[str, MatrixSpec]]:
    """Yields the spec of each tensor by each operation that reads it; rows are the operation's outputs."""
    straight, transposed = MatrixSpec((0,), (1,)), MatrixSpec((1,), (0,))
    for node in graph.node:
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        for i, name in enumerate(node.input):
            rank = ranks.get(name, 0)
            window = tuple(range(2, rank))
            if node.op_type == "MatMul" and rank == 2:
                yield name, transposed if i == 1 else straight
            elif node.op_type == "Gemm" and rank == 2:
                outputs_first = flags.get("transB", 0) if i == 1 else not flags.get("transA", 0)
                yield name, straight if outputs_first else transposed
            elif node.op_type in ("Conv", "FusedConv") and i == 1:  # The second belongs to ONNX Runtime.
                yield name, MatrixSpec((0,), (1,), window)
            elif node.op_type == "ConvTranspose" and i == 1:
                yield name, MatrixSpec((1,), (0,), window)
            elif node.op_type == "Gather" and i == 0 and rank == 2 and not flags.get("axis", 0):
                yield name, straight


ONNX = Format("ONNX", _detect, _open)
