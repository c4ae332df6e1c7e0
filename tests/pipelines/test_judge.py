import ast
import importlib.util
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from ziggurat.pipelines.shapes.judge import check, judge
from ziggurat.pipelines.shapes.render import Track, place
from ziggurat.pipelines.shapes.scenes import BACKGROUNDS, Scene, Thing, held_out_scenes, parse_caption

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("benchmark_judge", ROOT / "benchmarks" / "judge.py")
assert SPEC
assert SPEC.loader
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

SIZE = (9, 96, 96)
CIRCLE = Scene((Thing("large", "red", "circle", "moving left"),), "gray")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def still(size="large", colour="red", shape="circle", background="gray"):
    return Scene((Thing(size, colour, shape, "staying still"),), background)


@pytest.mark.parametrize(("objects", "clips"), [(1, 110), (2, 50)], ids=["one", "two"])
def test_true_clips_pass_and_one_wrong_attribute_fails(objects, clips):
    shares = bench.true_shares(clips, objects, Random(objects), SIZE)
    assert shares.keys() > {"passed"}
    assert all(share >= 0.99 for share in shares.values()), shares


@pytest.mark.parametrize("objects", [1, 2])
def test_noise_and_blur_pass(objects):
    wear = Random(5)
    shares = bench.true_shares(40, objects, Random(6 + objects), SIZE, lambda video: bench.worn(video, wear))
    assert shares["passed"] >= 0.97, shares
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.parametrize("name", [*bench.TAMPERS, *bench.ODDITIES])
def test_tampered_clips_are_rejected(name):
    promised = name in bench.TAMPERS
    tamper = (bench.TAMPERS | bench.ODDITIES)[name]
    assert bench.tampered_share(tamper, 34 if promised else 10, 1, Random(11), SIZE) >= (0.97 if promised else 0.9)


@pytest.mark.parametrize("name", bench.TAMPERS)
def test_tampered_clips_of_two_objects_are_rejected(name):
    assert bench.tampered_share(bench.TAMPERS[name], 8, 2, Random(12), SIZE) == 1


@pytest.mark.parametrize(
    "size",
    [(33, 128, 128), (1, 128, 128), (5, 32, 32), (2, 48, 48), (17, 64, 64), (5, 96, 160), (5, 160, 112)],
    ids=str,
)
def test_true_clips_pass_at_any_size(size):
    random = Random(21)
    for scene in [*random.sample(held_out_scenes(), 6), bench.draw(random, 2)]:
        result = check(bench.clip(scene, random, size), str(scene))
        assert result.right, (scene, result)


def test_a_verdict_has_the_scene_and_its_geometry():
    scene = parse_caption("a small blue triangle moving down and a large yellow square moving up on a navy background")
    tracks = place(scene, Random(3))
    verdict = judge(bench.film(scene, tracks, (7, 128, 128)))
    assert verdict.scene
    assert set(verdict.scene.things) == set(scene.things)
    assert verdict.background == "navy"
    assert verdict.faults == ()
    for thing, track in zip(scene.things, tracks, strict=True):
        (seen,) = [one for one in verdict.objects if one.colour == thing.colour]
        assert seen.radius == pytest.approx(track.radius, rel=0.02)
        assert (*seen.start, *seen.end) == pytest.approx((*track.start, *track.end), abs=0.004)
        assert seen.frames == tuple(range(7))


def test_one_frame_has_no_motion_to_judge():
    video = bench.clip(CIRCLE, Random(1), (1, 64, 64))
    for motion in ("moving left", "staying still"):
        result = check(video, f"a large red circle {motion} on a gray background")
        assert result.motion is None
        assert result.right
    assert judge(video).scene is None
    assert not check(video, "a large red square moving left on a gray background").right


def test_every_form_of_video_is_judged_alike():
    video = bench.clip(CIRCLE, Random(2), (3, 48, 48))
    forms = [video / 255.0, torch.from_numpy(video), torch.from_numpy(video).float() / 255, video[:, ::-1][:, ::-1]]
    assert {judge(form).scene for form in forms} == {CIRCLE}
    assert judge(torch.from_numpy(video).bfloat16() / 255).scene == CIRCLE


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (np.zeros((3, 64, 64), np.uint8), "must be"),
        (np.zeros((3, 3, 64, 64), np.uint8), "must be"),
        (np.zeros((0, 64, 64, 3), np.uint8), "must be"),
        (np.zeros((3, 64, 64, 3), np.int64), "uint8 or float"),
        (np.full((3, 64, 64, 3), -1.0), "0…1"),
        (np.full((3, 64, 64, 3), np.nan), "0…1"),
        (np.zeros((3, 16, 64, 3), np.uint8), "at least 32"),
    ],
)
def test_other_input_is_refused(video, said):
    with pytest.raises(ValueError, match=said):
        judge(video)


def test_a_sentence_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="grammar"):
        check(np.zeros((1, 64, 64, 3), np.uint8), "a cat")


@pytest.mark.parametrize("kind", ["blank", "noise"])
def test_a_video_of_nothing_is_wrong(kind):
    shape = (3, 64, 64, 3)
    video = np.full(shape, 112, np.uint8) if kind == "blank" else np.random.default_rng(0).random(shape)
    result = check(video, CIRCLE)
    assert not result.right
    assert not result.shape
    assert result.verdict.faults


def test_faults_say_what_and_when():
    tracks = place(CIRCLE, Random(4))
    video = bench.film(CIRCLE, tracks, (12, 96, 96))
    gone, red, jumped, flashed, dark = (video.copy() for _ in range(5))
    gone[5] = BACKGROUNDS["gray"]
    red[8:] = bench.film(parse_caption(str(CIRCLE).replace("red", "blue")), tracks, (12, 96, 96))[8:]
    jumped[6:] = np.roll(video[6:], 20, axis=1)
    flashed[3] = np.maximum(video[3], video[3, ::-1, ::-1])
    dark[9] = 14
    assert judge(gone).faults == ("the red circle vanishes in frame 5",)
    assert judge(red).faults == ("the red circle changes colour in frames 8 to 11",)
    assert "the red circle jumps in frame 6" in judge(jumped).faults
    assert judge(dark).faults == ("the background changes in frame 9", "the red circle vanishes in frame 9")
    assert all(not check(wrong, CIRCLE).right for wrong in (gone, red, jumped, flashed, dark))


def outline(inside):
    """One frame of a yellow shape on black, from a test of (x, y) about its middle."""
    y, x = (np.mgrid[:512, :512] + 0.5) / 512 - 0.5
    cover = inside(x, y).astype(float).reshape(128, 4, 128, 4).mean((1, 3))[..., None]
    return (14 + (np.array([240, 212, 52]) - 14) * cover).round().astype(np.uint8)[None]


@pytest.mark.parametrize(
    "inside",
    [
        lambda x, y: abs(x) + abs(y) < 0.2,
        lambda x, y: (x / 1.3) ** 2 + y**2 < 0.15**2,
        lambda x, y: np.maximum(abs(x) / 1.3, abs(y)) < 0.14,
        lambda x, y: np.maximum(-y, (abs(x) * 3**0.5 + y) / 2) < 0.1,
        lambda x, y: x**4 + y**4 < 0.15**4,
        lambda x, y: abs(np.hypot(x, y) - 0.15) < 0.04,
        lambda x, y: (np.hypot(x, y) < 0.18) & (y < 0),
        lambda x, y: np.minimum(np.maximum(abs(x) * 3, abs(y)), np.maximum(abs(y) * 3, abs(x))) < 0.18,
    ],
    ids=["diamond", "ellipse", "oblong", "upside down", "squircle", "ring", "half", "cross"],
)
def test_a_shape_outside_the_grammar_has_no_word(inside):
    (seen,) = judge(outline(inside)).objects
    assert seen.shape is None
    assert seen.colour == "yellow"


def test_a_soft_blob_is_no_circle():
    y, x = (np.mgrid[:128, :128] + 0.5) / 128 - 0.5
    share = np.exp(-(x**2 + y**2) / (2 * 0.1**2))[..., None].repeat(3, -1)
    assert not check(((14 + share * 228) / 255)[None], still(colour="white", background="black")).right


@pytest.mark.parametrize("colour", ["blue", "purple"])
def test_pale_objects_on_navy_are_found_and_nearly_invisible_ones_are_wrong(colour):
    scene = still("small", colour, "triangle", "navy")
    video, navy = bench.clip(scene, Random(7), (3, 128, 128)), np.array(BACKGROUNDS["navy"])
    faint = {share: (navy + (video - navy) * share).round().astype(np.uint8) for share in (0.75, 0.25)}
    assert check(faint[0.75], scene).right
    assert not check(faint[0.25], scene).right


def test_objects_that_touch_are_told_apart_by_colour():
    things = (Thing("small", "green", "square", "staying still"), Thing("large", "purple", "circle", "staying still"))
    scene = Scene(things, "navy")
    tracks = tuple(Track(at, at, radius) for at, radius in (((0.2, 0.4), 0.12), ((0.508, 0.4), 0.2)))
    assert check(bench.film(scene, tracks, (2, 128, 128)), scene).right


def test_a_mild_wobble_and_a_mottled_background_pass():
    random, rng = Random(8), np.random.default_rng(8)
    for scene in (CIRCLE, still("small", "white", "square"), still("large", "green", "triangle", "black")):
        video = bench.clip(scene, random, (12, 128, 128))
        shift = rng.integers(-1, 2, (12, 2))
        shaken = np.stack([np.roll(frame, tuple(by), (0, 1)) for frame, by in zip(video, shift, strict=True)])
        mottle = bench.ndimage.gaussian_filter(rng.normal(size=video.shape), (2, 12, 12, 0))
        result = check(np.clip(shaken / 255 + mottle / mottle.std() * 0.025, 0, 1), scene)
        assert result.right, (scene, result)


def test_training_never_reads_the_judge():
    folder = ROOT / "pipelines" / "shapes"
    own = {"judge", "measure"}
    assert own <= {file.stem for file in folder.glob("*.py")}
    for file in folder.glob("*.py"):
        if file.stem in own or file.stem.startswith("evaluate"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            read = own & {part for name in names for part in name.split(".")}
            assert not read, f"{file.name} imports {read}"


def test_true_clips_pass_after_a_round_trip_through_the_vae():
    folder = ROOT / "assets" / "shapes" / "vae"
    if not folder.exists():
        pytest.skip("assets/shapes/vae is not part of this checkout")
    shares = bench.true_shares(8, 1, Random(9), (17, 128, 128), bench.round_trip(folder))
    assert shares["passed"] == 1, shares
