"""What is said of a data set when it is loaded; `images` is its `datasets.ImageData`."""

from typing import Any

import numpy as np

from .folder import Arrays
from .layout import some

IMBALANCE = 10  # the largest class by the smallest, from which on it is said


def notes_on_flips(dataset: str, flip: bool | None, augment: str | None = None) -> list[str]:
    """Whether images of a folder are mirrored in training, and how to choose."""
    if flip and augment == "none":
        return ["the encoder's training images are not mirrored, since --augment is none"]
    if dataset != "folder":
        return []
    if flip:
        return ["training images are also mirrored (--flip True)"]
    return ["images are not mirrored; where left and right do not matter, --flip True does it"]


def notes_on_splits(arrays: Arrays, images: Any) -> list[str]:
    """What is odd about the splits: classes of few, no or most images, and images in two splits."""
    names, notes = images.class_names, []
    counts = {
        part: np.bincount(getattr(images, part).labels.cpu().numpy(), minlength=len(names))
        for part in ("train", "validation", "test")
    }

    def where(mask: np.ndarray) -> list[str]:
        return [names[k] for k in np.flatnonzero(mask)]

    trained = counts["train"]
    if unseen := where(trained == 0):
        notes.append(f"no training image is left of {some(unseen)}; add images, or move some there")
    if single := where(trained == 1):
        notes.append(f"classes with one training image: {some(single)}; add images")
    if unvalidated := where((trained > 0) & (counts["validation"] == 0)):
        chosen = "so that epochs and penalties are chosen without them"
        notes.append(f"classes without a validation image, {chosen}: {some(unvalidated)}")
    if untested := where((trained > 0) & (counts["test"] == 0)):
        notes.append(f"classes without a test image, so of unknown accuracy: {some(untested)}")
    if trained.max() >= IMBALANCE * max(trained[trained > 0].min(initial=trained.max()), 1):
        least = int(np.where(trained > 0, trained, trained.max()).argmin())
        most = int(trained.argmax())
        notes.append(
            f"classes are unbalanced: {trained[most]:,} training images of {names[most]}, "
            f"{trained[least]:,} of {names[least]}; see the accuracy of each class, and --balance"
        )
    if arrays.groups is not None:
        sizes = (f"{len(getattr(images, part)):,} {part}" for part in counts)
        notes.append(f"groups stay whole: {', '.join(sizes)} images")
    return notes + notes_on_copies(arrays, images)


def notes_on_copies(arrays: Arrays, images: Any) -> list[str]:
    """How many held-out images equal a training image, of a folder whose files were compared."""
    place = np.full(arrays.copies_of, -1) if arrays.copies else np.empty(0)
    starts = {"pretrain": 0, "validation": 0, "test": 0}  # of each split's source in the array
    if arrays.validation_images is not None:
        starts["validation"] = len(arrays.train_images)
    if arrays.test_images is not None:
        starts["test"] = arrays.copies_of - len(arrays.test_images)
    for number, (part, start) in enumerate(starts.items() if len(place) else []):
        place[getattr(images, part).rows.cpu().numpy() + start] = number
    groups = [place[list(group)] for group in arrays.copies]
    notes = []
    for number, part in ((1, "validation"), (2, "test")):
        seen = sum(int((group == number).sum()) for group in groups if (group == 0).any())
        if seen:
            notes.append(
                f"{seen} of {len(getattr(images, part))} {part} images are also training images "
                "(same pixels), so the scores are too good; remove the copies"
            )
    return notes
