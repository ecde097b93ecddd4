"""report.html: rendered from files alone, hostile names escaped, and opened in a real headless Chromium."""

import base64
import contextlib
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from badloss_jax.config import override
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.report.gallery import (
    Gallery,
    difference,
    highest_ranked,
    read_gallery,
    sheet,
    thumbnails,
    write_gallery,
)
from badloss_jax.report.page import main_kind, render_page, write_reports
from badloss_jax.report.results import cleansed_entry, read_results, read_scores, write_results
from badloss_jax.report.tables import as_text, detection_table, headline, removal_table, short_table, variant_title
from badloss_jax.runs.rescore import rescore
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import CLASS_NAMES, opened


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_in_a_browser(finished, browser, width):
    page = finished[0] / "report.html"
    console, asked = opened(browser, page, width)
    assert console == []
    assert {address for address in asked if not address.startswith("data:")} == {page.as_uri()}
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.scripts.length") == 0
    assert CLASS_NAMES[0] in browser.find_element(By.TAG_NAME, "body").text
    pictures = browser.execute_script("return Array.from(document.images, i => [i.alt, i.naturalWidth])")
    assert len(pictures) == 2 * 3 + 2 + 2 + 7 + 7  # triggers, trajectories, recall, ROC and scores of each kind
    assert all(alt and pixels for alt, pixels in pictures)
    for heading in ("What the models do", "What was attacked", "How they are learnt", "How well they are told apart",
                    "What each rule removes", "The highest-ranked images", "How it was run"):  # fmt: skip
        assert browser.find_element(By.XPATH, f"//h2[text()='{heading}']").is_displayed()
    shown = browser.find_elements(By.CSS_SELECTOR, "details[open] .card")
    assert len(shown) == 60
    assert all(card.is_displayed() for card in shown)
    picture = Image.open(io.BytesIO(shown[0].screenshot_as_png))
    assert len(picture.convert("RGB").getcolors(10_000)) > 20  # an image, a line, a label


def test_the_page_prints(finished, browser):
    opened(browser, finished[0] / "report.html", 1400)
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type /Page\b", printed)) <= 12


def test_two_thousand_images(finished, browser, tmp_path, rng):
    workdir, _, results = finished
    size = 2_500
    scores = read_scores(workdir / "scores.parquet")
    losses = TrajectoryStore.open(workdir / "trajectories").read("loss")
    rows = np.arange(size) % len(losses)
    many = type(scores)(
        scores.labels[rows], scores.attack_of[rows], scores.is_probe[rows], {"loss": rng.random(size)},
        {"loss": rng.random(size)}, {"loss": {"fraction": rng.random(size) < 0.4}},
    )  # fmt: skip
    images = rng.integers(0, 256, (2_000, 32, 32, 3), dtype=np.uint8)
    top = highest_ranked(many.distances["loss"], many.is_probe, 2_000)
    gallery = Gallery(top, np.zeros(2_000, int), images, images, np.array([], "U"), images[:0], images[:0])
    config = results["config"] | {"report": {"gallery": 2_000, "writers": []}}
    page = tmp_path / "many.html"
    page.write_text(render_page(results | {"config": config}, many, losses[rows], gallery), "utf-8")
    console, _ = opened(browser, page, 1400)
    assert console == []
    shown = "return Array.from(document.images).some(image => image.naturalWidth > 0)"
    WebDriverWait(browser, 60).until(lambda browser: browser.execute_script(shown))
    cards = browser.execute_script(
        "return Array.from(document.querySelectorAll('.card'), card => card.getBoundingClientRect().width)"
    )
    assert len(cards) == 2_000
    assert min(cards) > 0


def test_the_page_needs_no_data_and_asks_for_nothing(finished):
    page = (finished[0] / "report.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_markdown_escapes_names(finished):
    assert "<script" not in (finished[0] / "report.md").read_text("utf-8")


def test_a_rescoring_has_its_own_page(finished):
    fewer = ["--config.scoring.kinds=('loss','ranked')"]
    folder, results = rescore(finished[0], lambda config: override(config, fewer))
    page = (folder / "report.html").read_text("utf-8")
    assert results["class_names"] == list(CLASS_NAMES)
    assert "What the models do" not in page
    assert page.count("<summary>by") == 2
    assert write_reports(folder).read_text("utf-8") == page


def test_defences_beside_kinds_have_their_rows_and_panels(defended):
    workdir, config, results = defended
    names = ["loss", *config.defenses.names]
    assert [row[0] for row in detection_table(results)] == ["scored by", *names]
    titles = [row[0] for row in removal_table(results)]
    assert [title for title in titles if title.endswith("/fraction")] == [f"{name}/fraction" for name in names]
    assert [len(short_table(results)), len(headline(results))] == [1, 1]  # no network was trained to be shown
    scores = read_scores(workdir / "scores.parquet")
    assert list(scores.distances) == names
    for name, removed in scores.removed.items():  # "removed_loss_variance_fraction" is not the rule of "loss"
        of_ours = {"clusters"} if name in ("loss", "badloss", "badloss_logits", "badloss_step") else set()
        assert removed.keys() == {"fraction", "alpha", "fdr"} | of_ours, name
        assert removed["fraction"].mean() == pytest.approx(results["variants"][f"{name}/fraction"]["removed_share"])
    for values in scores.scores.values():
        assert (values.min(), values.max()) == (0, 1)
    page, markdown = (workdir / "report.html").read_text("utf-8"), (workdir / "report.md").read_text("utf-8")
    for name in names:
        assert f"by {name}</summary>" in page
        assert f'alt="ROC of {name}"' in page
        assert f'alt="Scores of {name}"' in page
        assert f"| {name} |" in markdown
    assert "Recall of loss against clean loss" in page
    for text in (page, markdown):
        assert "<script" not in text
        assert "What the models do" not in text
        assert "## Models" not in text
    assert "&lt;script&gt;" in page
    assert (workdir / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_detection_alone_is_rendered_again(defended, tmp_path):
    shutil.copytree(defended[0], tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert write_reports(tmp_path / "run").read_text("utf-8") == page
    for config in ({"retraining": {"enabled": True}}, {"retraining": 3}, []):
        write_results(tmp_path / "run" / "results.json", defended[2] | {"config": config})
        with pytest.raises(DataError, match=r"results.json cannot be used"):
            write_reports(tmp_path / "run")
    with pytest.raises(DataError, match=r"not of a whole run"):
        read_results(defended[0] / "results.json")  # a summary needs an undefended network


def test_networks_that_defences_trained_are_shown(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    model = results["recording_model"] | {"details": {"note": "<b>"}}
    cleansed = {"cbd": cleansed_entry(model, results["undefended"]), "pss": cleansed_entry(model, None)}
    results["variants"] |= cleansed
    write_results(tmp_path / "run" / "results.json", results)
    page = write_reports(tmp_path / "run").read_text("utf-8")
    markdown = (tmp_path / "run" / "report.md").read_text("utf-8")
    accuracy = f"{100 * model['clean_accuracy']:.1f} %"
    for row in (next(row for row in table(results) if row[0] == "cbd") for table in (headline, short_table)):
        assert row[1:3] == ["0.0 %", "0.0 %"]
        assert accuracy in row
    assert not {"cbd", "pss"} & {row[0] for row in (*removal_table(results), *detection_table(results))}
    for text in (page, markdown):
        assert "The network that cbd trained itself leaves" in text
        assert "<b>" not in markdown
    assert re.search(r'<tr><th scope="row" title="cbd">cbd</th>', page)  # no control
    assert '<tr class="control"><th scope="row" title="oracle">' in page
    assert "cbd, pss removed" in page
    assert "cbd, pss removed nothing" in markdown
    assert as_text(short_table(results)).count("\n") == len(short_table(results))


def test_an_own_rule_is_named_and_draws_no_threshold():
    config = {"rejection": {"fraction": 0.4}}
    assert variant_title("abl/own", config) == "abl (its own rule)"
    assert variant_title("abl/fraction", config) == "abl (40 %)"
    assert variant_title("cbd", config) == "cbd"


def test_what_is_shown_first():
    assert main_kind(["loss", "combined", "abl"]) == "combined"
    assert main_kind(["loss", "logits", "mean_loss_low"]) == "logits"
    assert main_kind(["badloss", "mean_loss_low"]) == "mean_loss_low"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gallery.npz", b"PK", r"gallery.npz is damaged"),
        ("scores.parquet", b"PAR1", r"scores.parquet is missing or damaged"),
        ("scores.parquet", None, r"scores.parquet is missing or damaged"),
        ("results.json", b"[", r"results.json is damaged"),
        ("results.json", b'{"schema_version": 99}', r"results.json cannot be used"),
        ("results.json", b'{"schema_version": 1, "undefended": {}}', r"lacks 'attacks', which older versions did not"),
        ("trajectories/about.json", None, r"holds no recorded trajectories"),
    ],
)
def test_damaged_files_are_named(finished, tmp_path, name, content, message):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / name).unlink() if content is None else (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        write_reports(tmp_path / "run")
    if name == "results.json":
        (tmp_path / "run" / name).unlink()
        with pytest.raises(UsageError, match="the folder of a finished run"):
            write_reports(tmp_path / "run")


def test_a_page_without_gallery(finished, tmp_path):
    """Runs that were copied without their images still have a page."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "gallery.npz").unlink()
    assert "The highest-ranked images" not in write_reports(tmp_path / "run").read_text("utf-8")


@pytest.mark.parametrize(
    "changed",
    [{"ids": np.arange(3)}, {"shown": np.zeros((2, 4, 4, 1))}, {"originals": np.zeros((2, 4, 5, 1), np.uint8)},
     {"true_labels": np.zeros(1, int)}, {"true_labels": np.array(["a", "b"])}, {"ids": np.zeros(2)},
     {"before": np.zeros((1, 4, 4, 3), np.uint8)}, {"attacks": np.array([1])},
     {"after": np.zeros((2, 4, 4, 1), np.uint8)}],
)  # fmt: skip
def test_galleries_of_others_are_checked(tmp_path, changed):
    images = np.zeros((2, 4, 4, 1), np.uint8)
    parts = {"ids": np.arange(2), "true_labels": np.zeros(2, int), "originals": images, "shown": images,
             "attacks": np.array(["patch"]), "before": images[:1], "after": images[:1]}  # fmt: skip
    write_gallery(tmp_path / "g.npz", Gallery(**parts))
    assert read_gallery(tmp_path / "g.npz").attacks.tolist() == ["patch"]
    write_gallery(tmp_path / "g.npz", Gallery(**parts | changed))
    with pytest.raises(DataError, match=r"g.npz is damaged"):
        read_gallery(tmp_path / "g.npz")


def test_a_flipped_byte_is_no_traceback(finished, tmp_path):
    whole = (finished[0] / "gallery.npz").read_bytes()
    for place in np.linspace(0, len(whole) - 1, 150).astype(int):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        (tmp_path / "g.npz").write_bytes(broken)
        with contextlib.suppress(DataError):
            read_gallery(tmp_path / "g.npz")


def test_gallery_shows_what_the_network_saw(finished):
    workdir, config, _ = finished
    gallery, scores = read_gallery(workdir / "gallery.npz"), read_scores(workdir / "scores.parquet")
    poisoned = scores.attack_of[gallery.ids] != ""
    assert poisoned.any()
    assert (~poisoned).any()
    changed = (gallery.shown != gallery.originals).any((1, 2, 3))
    np.testing.assert_array_equal(changed, poisoned)
    assert gallery.attacks.tolist() == list(config.attacks.names)
    for kind, distances in scores.distances.items():
        ranked = np.argsort(-np.where(scores.is_probe, -np.inf, distances), kind="stable")
        assert set(ranked[: config.report.gallery]) <= set(gallery.ids.tolist()), kind


def test_sheet_and_difference_by_hand():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) + np.zeros((3, 2, 1, 1), np.uint8)
    np.testing.assert_array_equal(sheet(images, 2)[..., 0], [[0, 1], [0, 1], [2, 0], [2, 0]])
    got = difference(np.array([10, 10, 0], np.uint8), np.array([13, 4, 200], np.uint8))
    np.testing.assert_array_equal(got, [30, 60, 255])


def test_large_images_are_stored_small():
    assert thumbnails(np.zeros((2, 224, 112, 3), np.uint8)).shape == (2, 64, 32, 3)
    assert thumbnails(np.zeros((0, 224, 112, 1), np.uint8)).shape == (0, 64, 32, 1)
