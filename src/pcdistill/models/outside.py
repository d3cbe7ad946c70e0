"""Teachers whose weights are elsewhere: behind a function of the user's, or behind an HTTP endpoint. Logits alone."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcdistill.errors import InputError
from pcdistill.files import home_followed, new_digest
from pcdistill.models.zoos import user_code, user_object


class OutsideModel(nn.Module):
    """Asks something else for logits, and checks what comes back.

    `identity` is a buffer, so that fingerprints of the state dict change with what is asked.

    Args:
        name: for sentences.
        num_classes: K, the logits that an answer must have for each image.
        identity: says what is asked; hashed.
    """

    identity: Tensor

    def __init__(self, name: str, num_classes: int, identity: bytes) -> None:
        super().__init__()
        self.name, self.num_classes = name, num_classes
        digest = new_digest()
        digest.update(identity)
        self.register_buffer("identity", torch.tensor(list(bytes.fromhex(digest.hexdigest())), dtype=torch.uint8))

    @abstractmethod
    def ask(self, images: Tensor) -> Any:
        """What is to be logits [N, K], for images [N, C, H, W] in float32."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] in float32 on the images' device.

        Raises:
            InputError: the answer is no such tensor; the sentence names what came.
        """
        images = images.float().contiguous()
        with torch.autocast(images.device.type, enabled=False):
            answer = self.ask(images)
        wanted = f"logits [{len(images)}, {self.num_classes}]"
        if not isinstance(answer, Tensor):
            raise InputError(f"the teacher {self.name} gave {type(answer).__name__}, not a tensor of {wanted}")
        if answer.shape != (len(images), self.num_classes):
            raise InputError(f"the teacher {self.name} gave the shape {list(answer.shape)}, not {wanted}")
        if not answer.is_floating_point():
            raise InputError(f"the teacher {self.name} gave {wanted} as {answer.dtype}; they must be floating-point")
        # A copy: the function may keep its own, or write the next answer into the same memory.
        logits = answer.detach().to(images.device, torch.float32, copy=True)
        if not bool(logits.isfinite().all()) and bool(images.isfinite().all()):
            bad = (~logits.isfinite()).any(dim=1).nonzero()[0].item()
            raise InputError(f"the teacher {self.name} gave NaN or infinite logits, first for image {bad} of a batch")
        return logits


class CalledModel(OutsideModel):
    """A function of a user's file that is called with images [N, C, H, W] and gives logits [N, K].

    Its identity is the file's content, the function's name and its arguments: of what the file imports, reads or asks
    nothing is known.

    Args:
        name: `path/to/file.py:function`.
        num_classes: K.
        kwargs: further arguments of every call.

    Raises:
        InputError: there is no such function.
        PcdistillError: the file fails.
    """

    def __init__(self, name: str, num_classes: int, kwargs: Mapping[str, Any]) -> None:
        self.path, _, attribute = name.rpartition(":")
        function = user_object(name)
        if isinstance(function, type):
            raise InputError(f"{name} is a class; teacher.call needs what is called with images and gives logits")
        if isinstance(function, nn.Module):
            raise InputError(f"{name} is a module; write a function that returns it, and leave teacher.call out")
        content = home_followed(self.path).read_bytes()
        super().__init__(name, num_classes, content + repr((attribute, sorted(kwargs.items()))).encode())
        self.function, self.kwargs = function, dict(kwargs)

    def ask(self, images: Tensor) -> Any:
        with user_code(self.path):
            return self.function(images, **self.kwargs)
