"""A trained network in a file that runs without this code: exported, and compared with it.

ONNX runs without PyTorch, pt2 is a program of torch.export. Both hold the preprocessing.
"""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import UserError

TOLERANCE = 1e-4  # between the exported network and PyTorch's
FileFormat = Literal["onnx", "pt2"]
InputType = Literal["uint8", "float32"]
Outputs = tuple[Tensor, Tensor]


def export_network(
    network: nn.Module,
    file_format: FileFormat,
    shape: tuple[int, int, int],
    input_type: InputType,
    class_names: Sequence[str],
) -> tuple[bytes, list[int], float]:
    """Export a network from images (B,*shape) to latents (B,D) and logits (B,K), for any B.

    `input_type` is uint8 or float32, of images in [0,1]. Returns the content of the file, (D, K)
    and the largest difference between the file's outputs and PyTorch's for 1 and for 7 random
    images, relative to the largest value if that exceeds 1. `UserError` if that is more than 1e-4.
    """

    def random_images(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, *shape), generator=generator)
        return images.byte() if input_type == "uint8" else images / 255

    write = {"onnx": _onnx, "pt2": _pt2}[file_format]
    with warnings.catch_warnings(action="ignore"):  # of the exporters about themselves
        # a batch size of 1 would become a constant
        content, run = write(network, random_images(2), json.dumps(class_names))
    difference = 0.0
    for count in (1, 7):
        images = random_images(count)
        with torch.inference_mode():
            expected, found = network(images), run(images)
        for ours, theirs in zip(expected, found, strict=True):
            distance = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1)
            difference = max(difference, distance.item())
    if not difference <= TOLERANCE:  # in this form NaN is caught too
        raise UserError(
            f"the exported network differs from PyTorch's by {difference:.1e} (at most "
            f"{TOLERANCE:.0e} is fine), so it is not kept; try other versions of torch and "
            "onnxruntime"
        )
    return content, [output.shape[1] for output in expected], difference


def _onnx(
    network: nn.Module, images: Tensor, class_names: str
) -> tuple[bytes, Callable[[Tensor], Outputs]]:
    """The content of an ONNX file, and what it computes, by onnxruntime."""
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["latents", "logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    model = program.model_proto
    for node in model.graph.node:  # source locations, with the paths of this machine
        node.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {"class_names": class_names})
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        found = session.run(["latents", "logits"], {"images": images.numpy()})
        return tuple(map(torch.from_numpy, found))

    return content, run


def _pt2(
    network: nn.Module, images: Tensor, class_names: str
) -> tuple[bytes, Callable[[Tensor], Outputs]]:
    """The content of a file of torch.export, and what it computes."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network, (images,), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # source locations, with the paths of this machine
        node.meta.pop("stack_trace", None)
    torch.export.save(program, file := io.BytesIO(), extra_files={"class_names.json": class_names})
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()
