"""Programs that JAX traced, in fewer operations, for runtimes that do not have all of JAX's.

These are the front end of OpenVINO, which knows no loops and calls, and ONNX.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Parameters of an equation that hold the program of a call or a loop.
_PROGRAMS = ("jaxpr", "call_jaxpr")


def written_out(jaxpr: core.Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """Computes a program without its loops and calls, for a trace that has none.

    Parameters that are NumPy arrays stay so: their parts are constants of the result.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(name: Any) -> Any:
        return name.val if isinstance(name, core.Literal) else values[name]

    for equation in jaxpr.eqns:
        given = [read(name) for name in equation.invars]
        primitive, about = equation.primitive, equation.params
        called = next((about[name] for name in _PROGRAMS if name in about), None)
        inner = getattr(called, "jaxpr", called), getattr(called, "consts", ())
        if primitive.name == "scan":
            first, second = about["num_consts"], about["num_consts"] + about["num_carry"]
            results, rows = given[first:second], []
            for layer in range(about["length"]):
                row = [stacked[layer] for stacked in given[second:]]
                results = written_out(*inner, *given[:first], *results[: second - first], *row)
                rows.append(results[second - first :])
            stacked = (jnp.stack(column) for column in zip(*rows, strict=True))
            results = [*results[: second - first], *stacked]
        elif called is not None:
            results = written_out(*inner, *given)
        elif primitive.name == "name":  # What the backward pass keeps.
            results = given
        elif primitive.name == "split":
            (whole,), axis = given, (slice(None),) * about["axis"]
            ends = np.cumsum(about["sizes"]).tolist()
            results = [whole[(*axis, slice(*part))] for part in zip([0, *ends], ends, strict=False)]
        elif primitive.name == "stack":
            parts = [jnp.expand_dims(part, about["axis"]) for part in given]
            results = [jnp.concatenate(parts, about["axis"])]
        elif primitive.name == "select_n" and given[1].dtype == bool:
            which, *cases = given  # onnxruntime chooses between numbers alone.
            results = [(which & cases[1]) | (~which & cases[0])]
        else:
            results = primitive.bind(*given, **about)
            results = results if primitive.multiple_results else [results]
        values |= zip(equation.outvars, results, strict=True)
    return [read(name) for name in jaxpr.outvars]
