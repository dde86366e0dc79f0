"""Each metric against a formula written down another way, and against itself on two ranks."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from extractor_files import ALEX, VGG, save_clip, save_dino, save_lpips
from PIL import Image
from ranks import on_ranks
from scipy.ndimage import gaussian_filter
from torch import multiprocessing, nn
from transformers import CLIPModel, CLIPProcessor, ViTModel

from fusedit.trainer.errors import UsageError
from fusedit.trainer.extractors import Clip, Dino, Extractors, Lpips
from fusedit.trainer.metrics import (
    CAPTIONS,
    METRICS,
    MOST_DB,
    Seen,
    features_of,
    make_metrics,
    psnr,
    to_tensor,
)

CPU = torch.device("cpu")
COUNT = 5


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extractors")
    return save_clip(folder / "clip"), save_dino(folder / "dino"), save_lpips(folder / "lpips")


def load(places):
    clip, dino, lpips = places
    return Extractors(Clip(clip, CPU), Dino(dino, CPU), Lpips(lpips, CPU))


def images(seed, count=COUNT):
    """Noise, half of which is that of every other seed."""
    own, shared = np.random.default_rng(seed), np.random.default_rng(0)
    size = 72, 80, 3
    pairs = [(own.integers(0, 128, size), shared.integers(0, 128, size)) for _ in range(count)]
    return [Image.fromarray((one + other).astype(np.uint8)) for one, other in pairs]


def captions(count=COUNT):
    return {name: [f"{name} number {row}" for row in range(count)] for name in CAPTIONS}


def seen_of(extractors, rows):
    edits, references, originals = ([images(seed)[row] for row in rows] for seed in (1, 2, 3))
    texts = {name: [lines[row] for row in rows] for name, lines in captions().items()}
    return Seen(
        edits=[to_tensor(image) for image in edits],
        references=[to_tensor(image) for image in references],
        features=features_of(extractors, edits, references, originals, texts),
    )


@pytest.fixture(scope="module")
def extractors(places):
    return load(places)


@pytest.fixture(scope="module")
def found(extractors):
    """Of each metric its value, and the rows' where it has them."""
    metrics = make_metrics(METRICS, extractors)
    seen = seen_of(extractors, range(COUNT))
    for metric in metrics.values():
        metric.update(torch.arange(COUNT), seen)
    return metrics


def arrays(seed):
    return [np.asarray(image, dtype=np.float64) / 255 for image in images(seed)]


def by_row(metric):
    return metric.by_row()[1].numpy()


def test_distances_of_pixels(found):
    pairs = list(zip(arrays(1), arrays(2), strict=True))
    squares = np.array([((a - b) ** 2).mean() for a, b in pairs])
    np.testing.assert_allclose(by_row(found["l1"]), [abs(a - b).mean() for a, b in pairs], 1e-5)
    np.testing.assert_allclose(by_row(found["l2"]), squares, 1e-5)
    np.testing.assert_allclose(by_row(found["psnr"]), -10 * np.log10(squares), 1e-5)
    assert found["psnr"].compute().item() == pytest.approx(-10 * np.log10(squares).mean(), 1e-5)


def numpy_ssim(one, other):
    """Wang et al. 2004, with mirrored borders, over the whole image."""

    def blur(values):
        return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5, mode="mirror")

    mean, its_mean = blur(one), blur(other)
    variance, its_variance = blur(one**2) - mean**2, blur(other**2) - its_mean**2
    shared = blur(one * other) - mean * its_mean
    above = (2 * mean * its_mean + 0.01**2) * (2 * shared + 0.03**2)
    return (above / (mean**2 + its_mean**2 + 0.01**2) / (variance + its_variance + 0.03**2)).mean()


def test_structural_similarity(found):
    wanted = [numpy_ssim(a, b) for a, b in zip(arrays(1), arrays(2), strict=True)]
    np.testing.assert_allclose(by_row(found["ssim"]), wanted, atol=1e-5)


def test_an_image_is_like_itself():
    assert psnr(images(1), images(1)) == [MOST_DB] * COUNT


def numpy_cosine(one, other):
    return [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(one, other, strict=True)]


@pytest.fixture(scope="module")
def embeddings(places):
    """Of edits, references and originals, and of the captions, by transformers' own way."""
    model = CLIPModel.from_pretrained(places[0])
    processor = CLIPProcessor.from_pretrained(places[0], backend="pil")
    texts = {**captions()}
    with torch.no_grad():
        outs = {
            name: model(**processor(text=texts["before"], images=images(seed), **PADDED))
            for name, seed in (("edit", 1), ("reference", 2), ("original", 3))
        }
        after = model(**processor(text=texts["after"], images=images(1), **PADDED))
    made = {name: out.image_embeds.double().numpy() for name, out in outs.items()}
    return made | {
        "before": outs["edit"].text_embeds.double().numpy(),
        "after": after.text_embeds.double().numpy(),
    }


PADDED = {"return_tensors": "pt", "padding": "max_length"}


def test_similarities_by_clip(found, embeddings):
    edit, reference, after = (embeddings[name] for name in ("edit", "reference", "after"))
    wanted = numpy_cosine(edit, reference)
    np.testing.assert_allclose(by_row(found["clip_image"]), wanted, atol=1e-5)
    np.testing.assert_allclose(by_row(found["clip_text"]), numpy_cosine(edit, after), atol=1e-5)


def test_the_directional_similarity_is_of_changes(found, embeddings):
    image = embeddings["edit"] - embeddings["original"]
    text = embeddings["after"] - embeddings["before"]
    np.testing.assert_allclose(
        by_row(found["clip_direction"]), numpy_cosine(image, text), atol=1e-4
    )


def test_the_class_token_by_dino(found, places):
    model = ViTModel.from_pretrained(places[1], add_pooling_layer=False)

    def token(image):
        pixels = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32)
        pixels = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            return model(pixel_values=pixels).last_hidden_state[0, 0].double().numpy()

    wanted = numpy_cosine(*([token(image) for image in images(seed)] for seed in (1, 2)))
    np.testing.assert_allclose(by_row(found["dino"]), wanted, atol=1e-4)


def alexnet(weights):
    """torchvision's `features`, up to the last ReLU that LPIPS sees; by index."""
    named = {
        int(name.split(".")[2]): tensor for name, tensor in weights.items() if "weight" in name
    }
    layers = {
        0: nn.Conv2d(3, 4, 11, stride=4, padding=2),
        2: nn.MaxPool2d(3, 2),
        3: nn.Conv2d(4, 6, 5, padding=2),
        5: nn.MaxPool2d(3, 2),
        6: nn.Conv2d(6, 8, 3, padding=1),
        8: nn.Conv2d(8, 6, 3, padding=1),
        10: nn.Conv2d(6, 6, 3, padding=1),
    }
    return nn.Sequential(*(layers.get(index, nn.ReLU()) for index in range(12))), [*named]


def vgg(weights):
    layers, channels = [], 3
    for several in (2, 2, 3, 3, 3):
        for _ in range(several):
            layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()]
            channels = 4
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1]), []


@pytest.mark.parametrize(
    ("layers", "build", "ends"),
    [(ALEX, alexnet, (1, 4, 7, 9, 11)), (VGG, vgg, (3, 8, 15, 22, 29))],
)
def test_lpips_by_its_formula(tmp_path, layers, build, ends):
    ours = Lpips(save_lpips(tmp_path, layers), CPU)
    own = {name: tensor for name, tensor in ours._weights.items() if name.startswith("net.")}
    network, _ = build(own)
    network.load_state_dict({name.split(".", 2)[2]: tensor for name, tensor in own.items()})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    one, other = (to_tensor(images(seed)[0]) for seed in (1, 2))
    total = 0.0
    with torch.no_grad():
        for level, end in enumerate(ends):
            maps = [
                network[: end + 1](
                    ((2 * image - 1).sub(shift[:, None, None]) / scale[:, None, None])[None]
                )
                for image in (one, other)
            ]
            one_unit, other_unit = (seen / (seen.pow(2).sum(1) + 1e-8).sqrt() for seen in maps)
            head = ours._weights[f"lin{level}.model.1.weight"].flatten()
            total += torch.einsum("c,nchw->nhw", head, (one_unit - other_unit) ** 2).mean().item()
    assert ours.distance(one[None], other[None]).item() == pytest.approx(total, rel=1e-5)
    assert ours.distance(one[None], one[None]).item() == 0


def test_the_frechet_distance_by_its_formula(found, extractors):
    seen = seen_of(extractors, range(COUNT)).features
    edits, references = (seen[f"dino.{name}"].double().numpy() for name in ("edit", "reference"))
    means = edits.mean(0) - references.mean(0)
    one, other = np.cov(edits.T), np.cov(references.T)
    eigenvalues = np.linalg.eigvals(one @ other).astype(complex)
    wanted = means @ means + np.trace(one + other) - 2 * np.sqrt(eigenvalues).sum().real
    assert found["fid_dino"].compute().item() == pytest.approx(wanted, rel=1e-4)


def test_the_kernel_distance_by_its_formula(found, extractors):
    seen = seen_of(extractors, range(COUNT)).features
    one, other = (seen[f"clip.{name}"].double().numpy() for name in ("edit", "reference"))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    # Every subset is of all rows, so each has the value of the whole.
    own = (
        sum(kernel(x, x).sum() - np.trace(kernel(x, x)) for x in (one, other)) / COUNT / (COUNT - 1)
    )
    wanted = own - 2 * kernel(one, other).mean()
    assert found["kid_clip"].compute().item() == pytest.approx(wanted, rel=1e-6)


def test_the_kernel_distance_draws_nothing_of_others(found):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert found["kid_dino"].compute() == found["kid_dino"].compute()
    assert torch.equal(before, torch.get_rng_state())


def _rank(rank, port, size, places, rows_of, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    extractors = load(places)
    metrics = make_metrics(METRICS, extractors)
    for row in rows_of[rank]:  # one at a time: on one rank too, or a product's order could differ
        for metric in metrics.values():
            metric.update(torch.tensor([row]), seen_of(extractors, [row]))
    values = {name: metric.compute().item() for name, metric in metrics.items()}
    rows = {name: m.by_row()[1].tolist() for name, m in metrics.items() if hasattr(m, "by_row")}
    if rank == 0:
        queue.put((values, rows))
    dist.destroy_process_group()


def measured(places, rows_of):
    queue, size = multiprocessing.get_context("forkserver").SimpleQueue(), len(rows_of)
    on_ranks(_rank, size, size, places, rows_of, queue)
    return queue.get()


def test_two_ranks_come_to_the_bits_of_one(places):
    values, rows = measured(places, [[0, 1, 2, 3, 4]])
    assert {*values} == {*METRICS}
    assert all(len(of) == COUNT for of in rows.values())
    assert measured(places, [[4, 1], [0, 3, 2]]) == (values, rows)
    assert measured(places, [[3, 4, 2, 0, 1], []]) == (values, rows)  # one saw nothing


def test_extractors_are_known_by_their_weights(places, tmp_path):
    assert Clip(save_clip(tmp_path / "clip"), CPU).sha256 == Clip(places[0], CPU).sha256
    other = Lpips(save_lpips(tmp_path / "lpips", VGG), CPU)
    assert other.sha256 != Lpips(places[2], CPU).sha256


@pytest.mark.parametrize(("cls", "flag"), [(Clip, "--clip"), (Dino, "--dino"), (Lpips, "--lpips")])
def test_what_is_no_extractor_is_refused_in_a_line(tmp_path, monkeypatch, cls, flag):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=f"{flag} {tmp_path}: .") as caught:
        cls(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)
