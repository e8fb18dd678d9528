"""What every model can do with folders: be saved to one and be loaded from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from cmpose.config import Backend, Config, ModelConfig
from cmpose.data.skeleton import default_skeleton
from cmpose.memory import shortage
from cmpose.models.weights import folder as model_folder
from cmpose.models.weights import packaged
from cmpose.models.weights.card import model_card

Model = TypeVar("Model", bound="SavedModel")


class SavedModel(nn.Module):
    """A network that is built of a ``ModelConfig``, with what its folder holds beside weights.

    ``config`` is the model's section of the recipe. ``recipe`` is the whole recipe where the model
    comes from a folder, else None; it says how crops are made. ``skeleton`` says what the K
    keypoints are; until it is set, they are PoseTrack's 15 or have no names. ``source`` is where
    the weights are from, for messages.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.skeleton = default_skeleton(config.num_keypoints)
        self.recipe: Config | None = None
        self.source = "the model"

    @classmethod
    def from_pretrained(
        cls: type[Model], path: str | Path, *, backend: Backend | None = None
    ) -> Model:
        """The model in a folder that :meth:`save_pretrained` or training wrote, in eval mode.

        Args:
            path: a local folder with ``model.safetensors`` and ``config.json``, such as
                ``RUN/model`` or a checkpoint; or the name of a packaged model.
            backend: which kernels run the ops; None keeps the recipe's.

        Raises:
            CheckpointError: when there is no such folder, or its files are damaged or do not fit.
        """
        folder = packaged.named(path) or Path(path).expanduser()
        if not model_folder.is_model(folder):
            advice = f"give a model's folder, such as RUN/model{packaged.in_words()}"
            if not folder.exists() and len(Path(path).parts) == 2 and not folder.is_absolute():
                advice += (
                    "; names on a hub are not looked up: download the repository (hf download "
                    f"{path} --local-dir DIR) and give DIR"
                )
            raise model_folder.CheckpointError(
                f"{path}: there is no {model_folder.WEIGHTS} there; {advice}"
            )
        recipe = model_folder.load_config(folder)
        if backend is not None:
            recipe.model.backend = backend
        try:
            model = cls(recipe.model)
        except ValueError as error:
            raise model_folder.CheckpointError(
                f"{folder / model_folder.CONFIG}: {error}; use another checkpoint of the run"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not (short := shortage(error)):
                raise
            raise model_folder.CheckpointError(
                f"{folder / model_folder.CONFIG}: {short} for the model that it describes; the "
                f"weights beside it are {(folder / model_folder.WEIGHTS).stat().st_size / 1e6:.1f} "
                "MB. Free memory; or, where it is damaged, use another checkpoint of the run"
            ) from error
        model.recipe, model.source = recipe, str(folder / model_folder.WEIGHTS)
        source = f"{folder / model_folder.WEIGHTS}, by {folder / model_folder.CONFIG},"
        model_folder.load_into(model, model_folder.load_weights(folder), source)
        model.skeleton = model_folder.load_skeleton(folder, recipe.model.num_keypoints)
        return model.eval()

    def save_pretrained(
        self,
        path: str | Path,
        *,
        recipe: Config | None = None,
        evaluations: Sequence[Mapping[str, Any]] = (),
        half: bool = False,
    ) -> Path:
        """Writes ``model.safetensors``, ``config.json``, ``skeleton.json`` and a model card.

        Args:
            path: the folder, written whole or not at all; a model that is there is replaced.
            recipe: what the model was trained with. None takes ``self.recipe``; a model without
                one gets the defaults beside its own section.
            evaluations: what is known of these weights
                (:func:`~cmpose.models.weights.card.model_card`); what is not given is called
                unknown in the card, ``README.md``.
            half: stores float16, half the bytes; what loads them computes in float32 as before.

        Returns:
            The folder.

        Raises:
            FileExistsError: if the folder holds no model, or a checkpoint that is trained on.
            OutputError: when it cannot be written.
        """
        folder = Path(path).expanduser()
        if (
            folder.exists()
            and not model_folder.is_model(folder)
            and (not folder.is_dir() or any(folder.iterdir()))
        ):
            raise FileExistsError(f"{path} holds something other than a model: give a new folder")
        if model_folder.is_model(folder):
            try:  # other programs call their files model.safetensors and config.json too
                model_folder.load_config(folder)
            except model_folder.CheckpointError as error:
                raise FileExistsError(
                    f"{path} holds a model that is none of cmpose ({error}): give a new folder"
                ) from error
        if (folder / model_folder.STATE).exists():
            raise FileExistsError(
                f"{path} is a checkpoint, from which its training goes on: give a new folder"
            )
        recipe = recipe or self.recipe or Config(model=self.config)
        card = model_card(recipe, evaluations)
        weights = self.state_dict()
        if half:
            weights = {key: _halved(value) for key, value in weights.items()}
        return model_folder.write(folder, weights, recipe, self.skeleton, card)


def _halved(tensor: Tensor) -> Tensor:
    """In float16, if it has a fraction and is not too large for that."""
    small = tensor.half() if tensor.is_floating_point() else tensor
    return small if small.isfinite().all() else tensor
