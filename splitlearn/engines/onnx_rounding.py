"""Weights of an exported stage in 8 or 4 bits: each product with a matrix becomes ONNX Runtime's `MatMulNBits`.

The matrices are rounded by ONNX Runtime's own function, with a scale and an offset for every BLOCK of them. Products
round the hidden state to 8 bits, too.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from splitlearn.engines.onnx_export import FUSED
from splitlearn.runtime import private_apis

BLOCK = 32
HEAD_BITS = 8
"""The least bits of the LM head: a logit is one product, where a hidden state is the sum of many layers' products."""
INT8_PRODUCTS = 4
"""The operator's `accuracy_level` for which it rounds its input to 8 bits."""
_TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float32): TensorProto.FLOAT}


def rounded(
    graph: bytes, weights: dict[str, NDArray[Any]], bits: int, head: str | None
) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """The graph with matrices of `bits`, and its weights. `head` names the LM head's matrix, if it has one."""
    model = onnx.load_model_from_string(graph)
    found = dict(weights)
    for node in model.graph.node:
        if node.op_type != FUSED:
            continue
        name = node.input[1]
        own = max(bits, HEAD_BITS) if name == head else bits
        names = [f"{name}.{part}" for part in ("rounded", "scales", "offsets")]
        if names[0] not in found:
            parts = private_apis.onnx_rounded(np.ascontiguousarray(weights[name].T), own, BLOCK)
            found |= dict(zip(names, parts, strict=True))
            model.graph.initializer.extend(map(_declared, names, parts))
        n_out, n_in = weights[name].shape
        node.op_type = "MatMulNBits"
        del node.attribute[:]
        node.input[:] = [node.input[0], *names]
        sizes = {"K": n_in, "N": n_out, "bits": own, "block_size": BLOCK, "accuracy_level": INT8_PRODUCTS}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sizes.items())
    used = {name for node in model.graph.node for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    made: bytes = model.SerializeToString()
    return made, {name: array for name, array in found.items() if name in used}


def _declared(name: str, array: NDArray[Any]) -> TensorProto:
    """A weight that is handed over when a session is made."""
    tensor = TensorProto(name=name, dims=array.shape, data_type=_TYPES[array.dtype])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": 0, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
