"""A search that is always on: folders that are followed, a server behind proxies, its health."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from random import Random

import numpy as np
import pytest
from playwright.sync_api import expect
from support.commands import error_of, start_interruptible
from support.processes import wait_until
from support.proxy import proxying
from support.served import Served, port_of, serving
from test_search_store import contents

from drl_jax.runtime.errors import UserError
from drl_jax.search import watch
from drl_jax.search.index_file import IndexPart
from drl_jax.search.session import Index
from drl_jax.search.update import IndexReport, update_index

ROOT = "/videos"


# ---------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def served(search_model, test_videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    videos, index = folder / "videos", folder / "index"
    (videos / "c").mkdir(parents=True)
    for number, path in enumerate(sorted(test_videos.iterdir())[:4]):
        shutil.copy2(path, videos / "c" if number == 3 else videos)
    update_index(search_model, videos, index)
    (folder / "temporary").mkdir()
    flags = ("--watch", f"--root_path={ROOT}/", "--allowed_hosts=videos.example.org")
    with serving(index, folder / "temporary", *flags) as (process, url):
        assert url.endswith("/videos/")
        yield Served(process, port_of(url), videos, index, folder / "temporary")


def addresses(page: str) -> set[str]:
    """The addresses in the attributes of a page, and those in its styles."""
    found = re.findall(r"""\s(?:href|src|action|data-[a-z]+)="(/[^"]*)"|url\('([^']*)'\)""", page)
    return {(one or other).replace("&amp;", "&") for one, other in found}


@pytest.mark.parametrize("strips", [False, True])
def test_all_addresses_work_behind_a_proxy(served, strips):
    with proxying(served.port, ROOT, strips=strips) as proxy:

        def get(address: str) -> bytes:
            assert address.startswith(f"{ROOT}/"), address
            with urllib.request.urlopen(proxy + address, timeout=60) as response:
                return response.read()

        (hit,) = json.loads(get(f"{ROOT}/api/search?q=a+circle&top=1"))["hits"]
        video = json.loads(get(f"{ROOT}/api/video?q=a+circle&video={hit['path']}"))
        assert get(hit["media"]) == (served.videos / hit["path"]).read_bytes()
        assert get(f"{video['frame_prefix']}0")[:2] == b"\xff\xd8"
        # Pages, the parts of them that scripts load, and all that they name.
        waiting = {f"{ROOT}/?q=a+circle&top=1&video={hit['path']}", f"{ROOT}/unsearchable"}
        waiting |= {f"{ROOT}/{part}?q=a+circle&video={hit['path']}" for part in ("tiles", "viewer")}
        visited = {page: get(page).decode() for page in waiting}
        named = set().union(*map(addresses, visited.values())) - visited.keys()
        assert {address.split("/")[2].partition("?")[0] for address in named - {ROOT}} == {
            *("", "static", "videos", "frames", "pictures", "clips")
        }
        for address in named - {ROOT}:
            assert get(address.partition("#")[0])
        assert ROOT in named  # Of the scripts.
        # The path of the page without its last slash; urllib follows to the page.
        with urllib.request.urlopen(f"{proxy}{ROOT}?q=what?", timeout=60) as response:
            assert (response.url, response.status) == (f"{proxy}{ROOT}/?q=what?", 200)


def test_a_browser_searches_behind_a_proxy(browser, served):
    """With the scripts: what they load, and where they lead."""
    film = served.videos / "video0.mp4"
    with proxying(served.port, ROOT, strips=True) as proxy, browser.new_context() as context:
        page, failed = context.new_page(), []
        page.on("response", lambda r: failed.append(r.url) if r.status >= 400 else None)
        page.goto(f"{proxy}{ROOT}/?q=a+circle&top=2")
        page.get_by_role("link", name="Load more").click()
        expect(page.locator(".tile")).to_have_count(4)
        page.locator(".tile a").first.click()
        expect(page.locator("#viewer-title")).to_be_visible()
        page.locator(".timeline").hover()
        expect(page.locator(".hover img")).to_have_attribute("src", re.compile(f"^{ROOT}/frames/"))
        page.keyboard.press("Escape")
        page.locator("#file").set_input_files(film)
        expect(page.locator("#parts")).to_contain_text("a video")
        page.goto(f"{proxy}{ROOT}/")
        page.locator("#recent .chip").click()
        expect(page).to_have_url(f"{proxy}{ROOT}/?q=a+circle")
        assert [url for url in failed if not url.endswith("/favicon.ico")] == []


def health(served: Served) -> tuple[int, dict]:
    status, kind, body = served.get("/health")  # Without the path of the proxy, in a container.
    assert kind == "application/json"
    return status, json.loads(body)


def test_the_health_of_a_server(served):
    moved = (served.index / "index.json").rename(served.index / "moved")
    try:
        status, answer = health(served)
        assert (status, answer["status"]) == (503, "error")
        assert answer["error"].startswith("there is no index in ")
    finally:
        moved.rename(served.index / "index.json")
    assert health(served)[0] == 200


def test_a_server_follows_its_folder(served, test_videos):
    """Also where it is away for a time, with all that it has."""

    def paths() -> set[str]:
        return {hit["path"] for hit in served.json(f"{ROOT}/api/search")["hits"]}

    before, clips = paths(), sorted(test_videos.iterdir())
    assert health(served) == (200, {"status": "ok", "videos": 4, "indexing": None})
    # What is still being written is not read: it would be listed as damaged.
    content = clips[4].read_bytes()
    with (served.videos / "new.mp4").open("wb") as file:
        for part in range(0, len(content), len(content) // 5 + 1):
            file.write(content[part : part + len(content) // 5 + 1])
            file.flush()
            time.sleep(0.4)
    (served.videos / "video0.mp4").rename(served.videos / "c" / "moved.mp4")
    expected = before - {"video0.mp4"} | {"new.mp4", "c/moved.mp4"}
    wait_until(lambda: paths() == expected, served.process, 60)
    assert served.json(f"{ROOT}/api/unsearchable")["files"] == []
    away = served.videos.rename(served.videos.with_name("away"))
    time.sleep(4)
    assert paths() == expected
    away.rename(served.videos)
    (served.videos / "new.mp4").unlink()
    wait_until(lambda: paths() == expected - {"new.mp4"}, served.process, 90)


# ---------------------------------------------------------------------- folders


def test_a_folder_that_is_not_mounted_is_one_line(tmp_path, monkeypatch):
    """While it is away, and then in pieces; and an update that fails is tried again."""
    monkeypatch.setattr(watch, "_LOOKED_EVERY", 0.5)
    monkeypatch.setattr(watch, "_BETWEEN", 100)
    folder, calls, errors = tmp_path / "videos", [], []
    folder.mkdir()
    names = [f"{number}.mp4" for number in range(5)]
    for name in names:
        (folder / name).write_text(name)

    def update(folder: Path, only: list[str]) -> IndexReport:
        calls.append(sorted(only))
        if (folder / "refused.mp4").exists():
            raise UserError("refused")
        return IndexReport(unavailable={"late.mp4": "it is late"} if len(calls) == 2 else {})

    def say(line: str | UserError) -> None:
        if isinstance(line, UserError):
            errors.append(line)

    stop = threading.Event()
    arguments = (update, [folder], stop, say)
    thread = threading.Thread(target=watch.follow, args=arguments)
    thread.start()
    wait_until(lambda: calls == [[]])
    # What could not be read is tried again, as the whole is not.
    (folder / "late.mp4").write_text("")
    wait_until(lambda: len(calls) == 3)
    assert calls[1:] == 2 * [["late.mp4"]]
    (folder / "0.en.srt").write_text("")
    wait_until(lambda: len(calls) == 4)
    assert calls.pop() == ["0.mp4"]
    away = folder.rename(tmp_path / "away")
    wait_until(lambda: len(errors) == 1)
    folder.mkdir()
    wait_until(lambda: len(errors) == 2)
    time.sleep(1.5)
    assert [str(error).replace(str(folder), "F") for error in errors] == [
        "F cannot be read: No such file or directory (ENOENT)",
        "no video is left in F: is it mounted? None is removed",
    ]
    away.rename(folder)  # At once: the folder, which is empty, is never away.
    (folder / "refused.mp4").write_text("")
    wait_until(lambda: len(errors) == 3)
    # First by name, and then as a whole, again and again.
    assert calls[3:5] == [["refused.mp4"], []]
    (folder / "refused.mp4").unlink()
    time.sleep(1.5)
    assert len(errors) == 3
    (folder / "0.mp4").unlink()
    wait_until(lambda: calls[-1] == ["0.mp4"])
    # Most files at once: only as a whole an update refuses that.
    for name in names[1:]:
        (folder / name).unlink()
    wait_until(lambda: calls[-1] == [])
    stop.set()
    thread.join()
    assert len(errors) == 3


def test_what_can_not_be_followed_is_one_line(tmp_path, search_run, monkeypatch, capsys):
    flags = (f"--workdir={search_run}", f"--videos={tmp_path}", f"--index={tmp_path / 'index'}")
    line = error_of("drl_jax.search", "index", *flags, "--watch", "--only=a.mp4", capsys=capsys)
    assert line.endswith("--watch follows the whole folder; omit --only")
    assert "no video in" in error_of("drl_jax.search", "index", *flags, "--watch", capsys=capsys)
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    line = error_of("drl_jax.search", "index", *flags, "--watch", capsys=capsys)
    assert line.endswith("--watch needs watchfiles: pip install 'drl_jax[watch]'")


# After some of them the process has time for an update, or is killed in one.
EVENTS, PAUSES, KILLED = 1_000, range(125, 1_000, 125), (375, 750)


def change(folder: Path, clips: list[Path], random: Random) -> None:
    """Changes something in a folder at random, of which `kept.mp4` is left alone."""
    files = [p for p in folder.rglob("*.*") if p.name != "kept.mp4"]
    folders = [p for p in folder.rglob("*") if p.is_dir()]
    name = f"{random.randrange(20)}.{random.choice(['mp4', 'mp4', 'mkv', 'txt'])}"
    place = random.choice([folder, *folders]) / name
    what = random.choice(["copy", "copy", "replace", "part", "text", "rename", "delete", "folder"])
    if what == "copy":
        shutil.copy(random.choice(clips), place)
    elif what == "replace":
        temporary = folder / ".part"
        shutil.copy(random.choice(clips), temporary)
        temporary.replace(place)
    elif what == "part":
        place.write_bytes(random.choice(clips).read_bytes()[: random.randrange(4000)])
    elif what == "text":
        place.write_text("no video")
    elif what == "rename" and files:
        random.choice(files).replace(place)
    elif what == "delete" and len(files) > 6:
        random.choice(files).unlink()
    elif what == "folder" and len(folders) < 3:
        place.with_suffix("").mkdir(exist_ok=True)
    elif what == "folder":
        chosen = random.choice(folders)
        if random.random() < 0.5:
            shutil.rmtree(chosen)
        elif not (moved := folder / f"moved {random.randrange(9)}").exists():
            chosen.replace(moved)


@pytest.mark.slow
def test_many_changes_with_kills_give_the_index_of_the_whole(
    search_run, search_model, test_videos, tmp_path
):
    clips = sorted(test_videos.iterdir())[:6]
    assert len({clip.stat().st_size for clip in clips}) == 6
    folder, index, random = tmp_path / "videos", tmp_path / "index", Random(0)
    folder.mkdir()
    shutil.copy(clips[0], folder / "kept.mp4")
    command = [sys.executable, "-m", "drl_jax.search", "index", "--watch", "--prune"]
    command += [f"--workdir={search_run}", f"--videos={folder}", f"--index={index}"]
    command += ["--encoder=jax", "--storage=float32"]

    printed = tmp_path / "printed"  # A pipe would be full in the end.
    printed.write_text("")

    def start(line: str) -> subprocess.Popen:
        before, environment = len(printed.read_text()), {**os.environ, "PYTHONUNBUFFERED": "1"}
        with printed.open("a") as file:
            options = {"stdout": file, "stderr": file, "env": environment}
            process = start_interruptible(command, **options)
        wait_until(lambda: line in printed.read_text()[before:], process)
        return process

    process = start("1 added, 0 changed, 0 moved, 0 removed, 0 unchanged; 0 cannot be searched")
    for number in range(EVENTS):
        change(folder, clips, random)
        time.sleep(random.uniform(2, 3) if number in PAUSES else 0.003)
        if number in KILLED:
            process.kill()
            process.wait()
            process = start("frames are encoded by jax")
    for clip in clips[1:3]:
        shutil.copy(clip, folder)
    new = tmp_path / "new"
    update_index(search_model, folder, new, storage="float32", shows_progress=False)
    expected = contents(new)

    def facts(videos) -> dict:
        return {path: (v.sha256, v.size, v.mtime_ns, bool(v.error)) for path, v in videos.items()}

    def is_alike() -> bool:
        return index.exists() and facts(contents(index)) == facts(expected)

    wait_until(is_alike, process, 90)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in printed.read_text()
    found, whole = (
        {hit.video.path: hit.score for hit in Index(i, search_model).search("a circle", top=99)}
        for i in (index, new)
    )
    assert found.keys() == whole.keys()
    assert len(found) == sum(not video.error for video in expected.values()) > 3
    # Features depend in the last bits on what is encoded together.
    np.testing.assert_allclose([found[path] for path in whole], [*whole.values()], atol=1e-5)
    assert IndexPart(index).windows() == IndexPart(new).windows()
