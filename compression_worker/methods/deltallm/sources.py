"""Where weights come from: a follower's own from the checkpoint, its anchor's as the anchor will be stored."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import StepContext
from compression_worker.making.beneath import implementation, packed_base
from compression_worker.making.inputs import opened
from compression_worker.making.reading import ArtifactTensors
from compression_worker.methods.deltallm.matrices import SharedMatrix
from compression_worker.tensors import checkpoint_files


class Sources:
    """Weights ``(N, K)`` in fp32. A context manager: it holds files open.

    With a packed base an anchor is what its codes stand for, so that a difference mends what quantization lost too.
    """

    def __init__(self, checkpoint: Checkpoint, base: Artifact | None) -> None:
        self._stack = ExitStack()
        self._files = self._stack.enter_context(checkpoint_files(checkpoint))
        self._packed: ArtifactTensors | None = None
        if base is not None:
            self._packed = self._stack.enter_context(implementation(base).open_merged(None, base))

    @classmethod
    def of(cls, context: StepContext) -> Sources:
        """Those of the step's inputs."""
        return cls(opened(context, "variant"), base_input(context))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def own(self, matrix: SharedMatrix) -> torch.Tensor:
        """The weight in the checkpoint."""
        return _oriented(matrix, self._files.file(matrix.name).tensor(matrix.name))

    def anchor(self, matrix: SharedMatrix) -> torch.Tensor:
        """The weight as it stands in the artifact."""
        if self._packed is None:
            return self.own(matrix)
        return _oriented(matrix, self._packed.tensor(matrix.name, torch.float32))


def base_input(context: StepContext) -> Artifact | None:
    """The packed base that the step was given, where there is one."""
    return packed_base(context) if "packed" in context.spec.inputs else None


def _oriented(matrix: SharedMatrix, weight: torch.Tensor) -> torch.Tensor:
    return (weight.T if matrix.linear.transposed else weight).to(torch.float32)
