"""A trained network as ONNX, to be run without PyTorch: exported, and compared with it."""

import json
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import UserError

TOLERANCE = 1e-4  # between onnxruntime and PyTorch


def export(
    network: nn.Module, shape: tuple[int, int, int], input_type: str, class_names: Sequence[str]
) -> tuple[bytes, list[int], float]:
    """Export a network from images (B,*shape) to latents (B,D) and logits (B,K), for any B.

    `input_type` is uint8 or float32, of images in [0,1]. Returns the content of the file, (D, K)
    and the largest difference between onnxruntime's outputs and PyTorch's for 1 and for 7 random
    images, relative to the largest value if that exceeds 1. `UserError` if that is more than 1e-4.
    """
    import onnx
    import onnxruntime

    def random_images(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, *shape), generator=generator)
        return images.byte() if input_type == "uint8" else images / 255

    with warnings.catch_warnings(action="ignore"):  # of the exporter about itself
        program = torch.onnx.export(
            network,
            (random_images(2),),  # a batch size of 1 would become a constant
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["latents", "logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    model = program.model_proto
    for node in model.graph.node:  # source locations, with the paths of this machine
        node.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {"class_names": json.dumps(class_names)})
    content = model.SerializeToString()

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    for count in (1, 7):
        images = random_images(count)
        found = session.run(["latents", "logits"], {"images": images.numpy()})
        with torch.inference_mode():
            expected = network(images)
        for ours, theirs in zip(expected, found, strict=True):
            distance = (ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp(min=1)
            difference = max(difference, distance.item())
    if not difference <= TOLERANCE:  # in this form NaN is caught too
        raise UserError(
            f"the exported network differs from PyTorch's by {difference:.1e} (at most "
            f"{TOLERANCE:.0e} is fine), so it is not kept; try other versions of onnxruntime"
        )
    return content, [output.shape[1] for output in expected], difference
