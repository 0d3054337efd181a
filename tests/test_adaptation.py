"""The laws of self-training (section II-B): ClassMix, image weights, the mean teacher, strong augmentation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_seg.adaptation.class_mix import mix_domains, sample_class_mask
from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.adaptation.pseudo_labels import CollapseWatch, describe_pseudo_labels, weigh_pseudo_labels
from hf_seg.adaptation.strong_augmentation import strong_augment
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.losses import cross_entropy
from hf_seg.normalization import Normalization, to_image, to_pixel_values


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n_classes", [1, 2, 3, 5, 8])
def test_half_of_the_classes_present_are_chosen_rounded_up(n_classes: int) -> None:
    labels = torch.arange(1, n_classes + 1).repeat(6, 2)
    for seed in range(20):
        mask = sample_class_mask(labels, seeded(seed))
        assert len(labels[mask].unique()) == math.ceil(n_classes / 2)
        assert not set(labels[mask].tolist()) & set(labels[~mask].tolist())  # complete classes


def test_every_class_is_chosen_as_often_as_any_other() -> None:
    labels = torch.tensor([[1, 3, 4, 8]])
    chosen = torch.stack([sample_class_mask(labels, seeded(seed)) for seed in range(400)])
    assert chosen.float().mean(0) == pytest.approx(0.5, abs=0.08)


def test_ignored_pixels_are_never_pasted_and_do_not_count_as_a_class() -> None:
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 2, 5]])
    for seed in range(20):
        mask = sample_class_mask(labels, seeded(seed))
        assert mask.sum() == 1 and not mask[0, :2].any()
    assert not sample_class_mask(torch.full((3, 3), IGNORE_INDEX), seeded()).any()


def test_class_mask_depends_on_its_own_image_alone() -> None:
    """Classes of other images in the batch do not count, and the generator is the only source of randomness."""
    labels = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(sample_class_mask(labels, seeded(5)), sample_class_mask(labels, seeded(5)))
    state = torch.get_rng_state()
    sample_class_mask(labels, seeded())
    assert torch.equal(torch.get_rng_state(), state)


def make_mix() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    source = {"pixel_values": torch.ones(2, 3, 2, 2), "labels": torch.full((2, 2, 2), 3)}
    target = {"pixel_values": -torch.ones(2, 3, 2, 2)}
    masks = torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])
    pseudo_labels = torch.tensor([[[5, 5], [6, IGNORE_INDEX]], [[1, 1], [1, 1]]])
    return source, target, masks, mix_domains(source, target, masks, pseudo_labels, torch.tensor([0.25, 0.5]))


def test_mix_takes_source_pixels_and_labels_where_the_mask_is() -> None:
    _, _, masks, mixed = make_mix()
    assert torch.equal(mixed["pixel_values"][:, 0] == 1, masks) and torch.equal(mixed["pixel_values"][:, 2] == 1, masks)
    assert mixed["labels"].tolist() == [[[3, 5], [6, IGNORE_INDEX]], [[3, 3], [3, 1]]]


def test_pasted_pixels_have_weight_one_and_others_the_lambda_of_their_image() -> None:
    _, _, _, mixed = make_mix()
    assert mixed["weights"].tolist() == [[[1, 0.25], [0.25, 0.25]], [[1, 1], [1, 0.5]]]


def test_target_loss_divides_by_all_valid_pixels_and_not_by_their_weights() -> None:
    """Eq. 6: an image of low confidence lowers the loss."""
    _, _, _, mixed = make_mix()
    logits = torch.zeros(2, OPEN_EARTH_MAP.num_labels, 2, 2)
    loss = cross_entropy(logits, mixed["labels"], weights=mixed["weights"])
    assert loss.item() == pytest.approx(math.log(OPEN_EARTH_MAP.num_labels) * (1 + 0.25 * 2 + 3 + 0.5) / 7)


def logits_of(confidences: list[list[float]], winner: int = 4) -> Tensor:
    """(B, C, 1, W) logits whose softmax gives `winner` each confidence, the rest shared by classes 1..8."""
    probs = torch.tensor(confidences)[:, None, None]
    rest = (1 - probs) / (OPEN_EARTH_MAP.num_labels - 2)
    probs = torch.cat([probs if index == winner else rest for index in range(OPEN_EARTH_MAP.num_labels)], dim=1)
    probs[:, BACKGROUND] = 0
    return probs.log()


def test_lambda_is_the_share_of_confident_pixels_of_each_image() -> None:
    labels, weights = weigh_pseudo_labels(logits_of([[0.99, 0.5, 0.97, 0.9], [0.5, 0.5, 0.5, 0.5]]), 0.968)
    assert weights.tolist() == [0.5, 0.0]
    assert (labels == 4).all()  # pixels of low confidence keep their label


def test_a_pixel_at_the_threshold_is_confident() -> None:
    logits = torch.full((1, OPEN_EARTH_MAP.num_labels, 1, 1), -torch.inf)
    logits[:, 2] = 0
    assert weigh_pseudo_labels(logits, 1.0)[1].tolist() == [1.0]


def test_invalid_pixels_have_no_label_and_do_not_count() -> None:
    valid = torch.tensor([[[True, True, False, False]], [[False] * 4]])
    labels, weights = weigh_pseudo_labels(logits_of([[0.99, 0.5, 0.99, 0.99]] * 2), valid=valid)
    assert labels.tolist() == [[[4, 4, IGNORE_INDEX, IGNORE_INDEX]], [[IGNORE_INDEX] * 4]]
    assert weights.tolist() == [0.5, 0.0]


def test_background_is_predicted_only_where_it_is_a_class() -> None:
    logits = torch.zeros(1, OPEN_EARTH_MAP.num_labels, 1, 1)
    logits[:, BACKGROUND], logits[:, 7] = 9, 8
    before = logits.clone()
    assert weigh_pseudo_labels(logits)[0].item() == 7
    assert weigh_pseudo_labels(logits, keep_background=True)[0].item() == BACKGROUND
    assert torch.equal(logits, before)


def test_description_counts_valid_pixels() -> None:
    labels = torch.tensor([[[5, 5, 6, IGNORE_INDEX]], [[IGNORE_INDEX] * 3 + [6]]])
    described = describe_pseudo_labels(labels, torch.tensor([1.0, 0.0]))
    assert described["mean_weight"] == 0.5
    assert described["confident_pixels"] == 0.75  # three pixels of the first image, one of the second
    assert described["pseudo_share_tree"] == 0.5 and described["pseudo_share_water"] == 0.5
    assert sum(described[f"pseudo_share_{name}"] for name in OPEN_EARTH_MAP.names) == 1


def test_collapse_is_reported_after_patience_and_only_if_it_lasts() -> None:
    watch = CollapseWatch(patience=3)
    dominated, healthy = [0, 0.02, 0.98, 0, 0, 0, 0, 0, 0], [0, 0.3, 0.7, 0, 0, 0, 0, 0, 0]
    assert [watch.update(shares, 0.4) for shares in (dominated, dominated, healthy, dominated, dominated)] == [None] * 5
    warning = watch.update(dominated, 0.4)
    assert warning is not None and warning.startswith("COLLAPSE: 98.0 % of the pseudo-labels are rangeland")
    stuck = [watch.update(healthy, 0.0) for _ in range(6)]
    assert [message is not None for message in stuck] == [False, False, True, False, False, True]
    assert "STALLS" in str(stuck[2])


class Student(nn.Module):
    """Weights, a running mean and a dropout: each is treated differently by a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.dropout(self.norm(pixel_values))


def student_at(value: float) -> Student:
    student = Student()
    for tensor in (*student.parameters(), student.norm.running_mean):
        nn.init.constant_(tensor, value)
    return student


def test_warm_up_of_the_teacher_is_a_running_mean_and_then_the_decay() -> None:
    """a_t = min(1 - 1 / (t + 1), decay) from t = 0: the first update copies."""
    teacher = MeanTeacher(student_at(100.0), decay=0.75)
    expected, values = 0.0, [1.0, 2.0, 6.0, 3.0, 5.0, 8.0]
    for t, value in enumerate(values):
        teacher.update(student_at(value))
        decay = min(1 - 1 / (t + 1), 0.75)
        expected = decay * expected + (1 - decay) * value
        assert teacher.model.norm.weight.tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert int(teacher.step) == len(values)
    mean = MeanTeacher(student_at(0.0))
    for value in values:
        mean.update(student_at(value))
    assert mean.model.norm.bias.tolist() == pytest.approx([sum(values) / len(values)] * 3)


def test_buffers_are_copied_and_not_averaged() -> None:
    teacher = MeanTeacher(student_at(0.0), decay=0.9)
    for value in (1.0, 2.0, 3.0):
        student = student_at(value)
        student.norm.num_batches_tracked += 7
        teacher.update(student)
    assert teacher.model.norm.running_mean.tolist() == [3.0] * 3
    assert teacher.model.norm.num_batches_tracked == 7


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is read into Python, which on a GPU makes the host wait."""

    reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_only_the_first_update_reads_the_step_count() -> None:
    teacher, student = MeanTeacher(student_at(0.0), decay=0.9), student_at(1.0)
    with CountReads() as counted:
        teacher.update(student)
        assert counted.reads == 1
        for _ in range(3):
            teacher.update(student)
    assert counted.reads == 1
    assert int(teacher.step) == 4


def test_a_loaded_step_count_replaces_the_one_counted_so_far() -> None:
    fresh, used = (MeanTeacher(student_at(0.0), decay=0.9) for _ in range(2))
    for _ in range(5):
        used.update(student_at(1.0))
    used.load_state_dict(fresh.state_dict())
    used.update(student_at(3.0))  # the first update of the warm-up copies
    assert used.model.norm.weight.tolist() == [3.0] * 3
    assert int(used.step) == 1


def test_step_count_survives_the_weights_file(tmp_path: Path) -> None:
    """Else the first update after a resume would overwrite the teacher with the student."""
    teacher = MeanTeacher(student_at(0.0), decay=0.9)
    for _ in range(50):
        teacher.update(student_at(1.0))
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    resumed = MeanTeacher(student_at(7.0), decay=0.9)
    resumed.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    for each in (teacher, resumed):
        each.update(student_at(2.0))
    assert int(resumed.step) == 51
    assert resumed.model.norm.weight.tolist() == pytest.approx([0.9 * 1 + 0.1 * 2] * 3)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), teacher.state_dict().values(), strict=True)
    )


def test_teacher_never_drops_out_nor_learns_nor_changes_its_student() -> None:
    student = student_at(1.0)
    teacher = MeanTeacher(student)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    pixel_values = torch.randn(2, 3, 4, 4, generator=seeded())
    out = teacher(pixel_values)
    assert torch.equal(out, teacher(pixel_values)) and not out.requires_grad
    assert not any(value.requires_grad for value in teacher.parameters())
    assert all(value.requires_grad for value in student.parameters()) and student.training
    teacher.update(student_at(5.0))
    assert student.norm.weight.tolist() == [1.0] * 3


def batch_normalised(norm: nn.BatchNorm2d, pixel_values: Tensor) -> Tensor:
    return nn.functional.batch_norm(pixel_values, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_a_teacher_labels_by_the_statistics_of_its_batch_without_dropout(momentum: float | None) -> None:
    student = student_at(2.0)
    student.norm.momentum = momentum
    teacher, pixel_values = MeanTeacher(student), 3 * torch.randn(4, 3, 8, 8, generator=seeded()) + 5
    torch.testing.assert_close(teacher(pixel_values), batch_normalised(student.norm, pixel_values))
    assert torch.equal(teacher(pixel_values), teacher(pixel_values))


def test_a_teachers_buffers_are_those_of_its_student() -> None:
    teacher = MeanTeacher(student_at(2.0))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    buffers = [id(buffer) for buffer in teacher.buffers()]
    teacher(torch.randn(4, 3, 8, 8, generator=seeded()))
    assert [id(buffer) for buffer in teacher.buffers()] == buffers
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    with pytest.raises(RuntimeError):
        teacher(torch.randn(4, 5, 8, 8))  # of other channels
    assert [id(buffer) for buffer in teacher.buffers()] == buffers
    assert not teacher.model.norm._forward_pre_hooks


def test_the_model_that_is_exported_uses_running_statistics() -> None:
    pixel_values = torch.randn(4, 3, 8, 8, generator=seeded())
    student = student_at(2.0)
    teacher, expected = MeanTeacher(student), student.eval()(pixel_values)
    teacher(pixel_values)
    assert torch.equal(teacher.model(pixel_values), expected)
    assert torch.equal(MeanTeacher(student, batch_norm="running")(pixel_values), expected)
    assert not torch.allclose(teacher(pixel_values), expected)
    with pytest.raises(ValueError, match="batch_norm must be 'batch' or 'running'; it is 'eval'"):
        MeanTeacher(student, batch_norm="eval")  # type: ignore[arg-type]


def test_half_precision_has_the_statistics_of_single_precision() -> None:
    student = student_at(2.0)
    pixel_values = (torch.randn(4, 3, 8, 8, generator=seeded()) + 100).bfloat16()
    expected = batch_normalised(student.norm, pixel_values.float())
    torch.testing.assert_close(MeanTeacher(student)(pixel_values).float(), expected, rtol=0.01, atol=0.01)


def test_one_value_per_channel_is_normalised_by_running_statistics() -> None:
    """E.g. UperNet's 1 x 1 pooling of a single image, which has no variance."""
    student = student_at(2.0)
    teacher, pixel_values = MeanTeacher(student), torch.randn(1, 3, 1, 1, generator=seeded())
    assert torch.equal(teacher(pixel_values), student.eval()(pixel_values))


def label_half(rank: int, folder: Path) -> None:
    """Let one of two processes label its half of a batch."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batch = torch.randn(4, 3, 8, 8, generator=seeded()) + 5
    teacher = MeanTeacher(student_at(2.0))
    logits = teacher(batch.chunk(2)[rank])
    single = teacher(batch[rank : rank + 1, :, :1, :1])  # two values per channel, one in each process
    save_file({"logits": logits, "single": single}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


def test_two_processes_label_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(label_half, (tmp_path,), nprocs=2)
    halves = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    batch, norm = torch.randn(4, 3, 8, 8, generator=seeded()) + 5, student_at(2.0).norm
    torch.testing.assert_close(torch.cat([half["logits"] for half in halves]), batch_normalised(norm, batch))
    single = batch_normalised(norm, batch[:2, :, :1, :1])
    torch.testing.assert_close(torch.cat([half["single"] for half in halves]), single)


def picture(size: int = 24) -> Tensor:
    """(3, H, W) normalised random colours with a black corner."""
    levels = torch.randint(1, 256, (size, size, 3), generator=seeded(), dtype=torch.uint8)
    levels[:8, :8] = 0
    return to_pixel_values(levels.numpy())


def test_strong_augmentation_is_off_at_probability_zero() -> None:
    images = torch.stack([picture(), picture()])
    same = strong_augment(images, [seeded(0), seeded(1)], jitter_prob=0, blur_prob=0)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)


def test_strong_augmentation_of_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.stack([picture()] * 4)
    batch = strong_augment(images, [seeded(seed) for seed in range(4)])
    for seed in range(4):
        assert torch.equal(strong_augment(images[:1], [seeded(seed)])[0], batch[seed])


def test_each_sample_is_drawn_independently() -> None:
    images = picture().expand(200, -1, -1, -1)
    flat = strong_augment(images, [seeded(seed) for seed in range(200)], blur_prob=0)
    changed = ((flat - images).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean()
    assert changed == pytest.approx(0.5, abs=0.1)
    blurred = strong_augment(images, [seeded(seed) for seed in range(200)], jitter_prob=0)
    # sigma 0.15 does not change the picture, so not every blur is seen
    assert 0.35 < ((blurred - images).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean() < 0.6


def test_nodata_stays_black_under_blur_and_jitter() -> None:
    images = picture().expand(20, -1, -1, -1)
    out = strong_augment(images, [seeded(seed) for seed in range(20)], jitter_prob=1, blur_prob=1)
    black = images[0, :, 0, 0]
    torch.testing.assert_close(out[:, :, :8, :8], black.view(1, 3, 1, 1).expand(20, 3, 8, 8), rtol=0, atol=1e-6)
    assert (out[:, :, 8:, 8:] - images[:, :, 8:, 8:]).abs().amax(dim=(1, 2, 3)).min() > 0.05


def test_jitter_stays_within_its_span() -> None:
    """A grey image has no hue: it is only scaled, by 0.8 to 1.2."""
    grey = to_pixel_values(torch.full((8, 8, 3), 100, dtype=torch.uint8).numpy())[None].expand(50, -1, -1, -1)
    out = strong_augment(grey, [seeded(seed) for seed in range(50)], jitter_prob=1, blur_prob=0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    factors = (out[:, :, 0, 0] * std + mean) / (100 / 255)
    assert factors.min() > 0.8 - 1e-4 and factors.max() < 1.2 + 1e-4 and factors.std() > 0.08


def test_strong_augmentation_of_another_normalisation_is_the_same_picture() -> None:
    half = Normalization((0.5, 0.5, 0.5), (0.25, 0.5, 0.75))
    levels = to_image(picture())
    for seed in range(5):
        images = [to_pixel_values(levels, each)[None] for each in (Normalization(), half)]
        ours = strong_augment(images[0], [seeded(seed)], jitter_prob=1, blur_prob=1)[0]
        theirs = strong_augment(images[1], [seeded(seed)], jitter_prob=1, blur_prob=1, normalization=half)[0]
        torch.testing.assert_close(half.invert(theirs), Normalization().invert(ours), rtol=0, atol=0.01)
