"""`lljax push`: what it uploads, writes and refuses, against a hub on this machine."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from lljax.cli import export as export_command
from lljax.cli.push import main


class Hub:
    """The requests of an upload, answered as the hub answers them. Every file is a regular one.

    status: of the answers to what changes something. files: by name, as uploaded.
    """

    def __init__(self):
        self.status, self.private, self.files, self.requests = 200, True, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body):
                status, content = hub.answer(self.command, self.path, self.headers, body)
                content = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method, path, headers, body):
        self.requests.append((method, path, body))
        if headers["Authorization"] != "Bearer secret":
            return 401, {"error": "Invalid username or password."}
        if method == "POST" and self.status != 200:
            return self.status, {"error": "told by the hub"}
        if path == "/api/repos/create":
            return 200, {"url": f"{self.url}/me/model"}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": file, **modes} for file in files]}
        if "/commit/" in path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    value = row["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            return 200, {
                "success": True,
                "commitOid": "abc",
                "commitUrl": f"{self.url}/me/model/commit/abc",
            }
        if "/branch/" in path:
            return 200, {}
        license = {"license": "mit"} if path == "/api/models/org/tiny" else {}
        content = {"id": "me/model", "private": self.private, "siblings": [], "cardData": license}
        return 200, content


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, two_steps):
    """The run, its adapter exported at step 1."""
    folder = shutil.copytree(two_steps, tmp_path_factory.mktemp("pushed") / "run")
    export_command.main([f"--workdir={folder}", "--step=1"])
    return folder


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def card(workdir: Path) -> Path:
    return workdir / "export" / "peft" / "README.md"


def refused(capsys, *flags, code=2):
    with pytest.raises(SystemExit, match=str(code)):
        main(flags)
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith(("ConfigError: ", "HubError: "))] == error
    (line,) = error
    return line


def test_the_export_and_its_card_are_uploaded_and_nothing_else(workdir, hub, capsys):
    export = workdir / "export" / "peft"
    (export / "notes.txt").write_text("mine")
    (export / "optimizer").mkdir()
    (export / "optimizer" / "state").write_text("state")
    main([f"--workdir={workdir}", "--repo=me/model", "--private"])
    names = {"adapter_config.json", "adapter_model.safetensors", "rope.json"}
    assert set(hub.files) == {*names, "README.md", "loss.png"}
    for name in ("adapter_model.safetensors", "rope.json", "README.md", "loss.png"):
        assert hub.files[name] == (export / name).read_bytes()
    (created,) = [body for _, path, body in hub.requests if path.endswith("/create")]
    assert b'"private"' in created
    printed = capsys.readouterr().out
    assert "notes.txt, optimizer/state" in printed and "/commit/abc" in printed
    uploaded = b"".join(content for name, content in hub.files.items() if "png" not in name)
    assert str(workdir.parent).encode() not in uploaded


def test_an_adapter_names_its_base_as_the_card_does(workdir, hub, tiny):
    local = workdir / "export" / "peft" / "adapter_config.json"
    main([f"--workdir={workdir}", "--repo=me/model"])
    uploaded = json.loads(hub.files["adapter_config.json"])
    assert uploaded["base_model_name_or_path"] == Path(tiny).name
    assert json.loads(local.read_text())["base_model_name_or_path"] == tiny
    main([f"--workdir={workdir}", "--repo=me/model", "--base_model=org/tiny"])
    uploaded = json.loads(hub.files["adapter_config.json"])
    assert uploaded["base_model_name_or_path"] == "org/tiny"
    text = hub.files["README.md"].decode()
    assert "\nlicense: mit\n" in text  # which the hub has for the base
    assert "base_model: org/tiny\n" in text and "base_model_relation: adapter\n" in text
    assert "AutoConfig.from_pretrained('org/tiny')" in text
    assert "PeftModel.from_pretrained(model, 'model')" in text and "open('model/rope.json')" in text


def test_a_dry_run_writes_the_card_and_asks_nothing(workdir, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    main([f"--workdir={workdir}", "--repo=me/model", "--dry_run"])
    assert not hub.requests and card(workdir).is_file()
    printed = capsys.readouterr().out
    sizes = [
        path.stat().st_size for path in card(workdir).parent.iterdir() if "lljax" not in path.name
    ]
    total = next(line for line in printed.splitlines() if line.startswith("me/model: 5 files"))
    # but for the name of the base in adapter_config.json
    assert abs(int(total.split()[3].replace(",", "")) - sum(sizes)) < 200
    assert "Nothing is uploaded" in printed


def test_the_card_is_of_the_step_that_was_exported(workdir, hub):
    main([f"--workdir={workdir}", "--repo=me/model", "--dry_run"])
    assert "in 1 step of" in card(workdir).read_text()


def test_an_edited_card_stays_and_is_uploaded(workdir, hub, capsys):
    flags = [f"--workdir={workdir}", "--repo=me/model"]
    main([*flags, "--dry_run"])
    first = card(workdir).read_text()
    main([*flags, "--license=mit", "--dry_run"])  # unedited: written again
    assert "license: mit" in card(workdir).read_text() != first
    card(workdir).write_text("my own words")
    capsys.readouterr()
    main(flags)
    assert hub.files["README.md"] == b"my own words"
    assert "--overwrite_card" in capsys.readouterr().out
    main(flags)  # still known as edited
    assert hub.files["README.md"] == b"my own words"
    error = refused_export(capsys, workdir)
    assert "README.md" in error
    main([*flags, "--overwrite_card"])
    assert hub.files["README.md"] == card(workdir).read_bytes() != b"my own words"


def refused_export(capsys, workdir):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        export_command.main([f"--workdir={workdir}", "--overwrite"])
    return capsys.readouterr().err


def test_a_card_that_nobody_edited_is_replaced_with_the_export(workdir, hub):
    main([f"--workdir={workdir}", "--repo=me/model", "--dry_run"])
    export_command.main([f"--workdir={workdir}", "--overwrite"])
    assert not card(workdir).exists()


def test_a_revision_is_a_branch_that_is_made(workdir, hub):
    main([f"--workdir={workdir}", "--repo=me/model", "--revision=v1", "--message=first"])
    paths = [path for _, path, _ in hub.requests]
    assert "/api/models/me/model/branch/v1" in paths
    (commit,) = [body for _, path, body in hub.requests if "/commit/v1" in path]
    assert json.loads(commit.splitlines()[0])["value"]["summary"] == "first"
    assert "hf download me/model --revision v1" in card(workdir).read_text()


def test_a_public_repository_is_not_taken_for_a_private_one(workdir, hub, capsys):
    hub.private = False
    error = refused(capsys, f"--workdir={workdir}", "--repo=me/model", "--private")
    assert "there and public" in error and not hub.files
    main([f"--workdir={workdir}", "--repo=me/model"])
    assert hub.files


@pytest.mark.parametrize(
    "status,told,code",
    [(403, "needs the role write", 2), (402, "payment", 2), (500, "same command again", 68)],
)
def test_an_answer_of_the_hub_is_one_line_with_the_way_out(
    workdir, hub, capsys, monkeypatch, status, told, code
):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    hub.status = status
    error = refused(capsys, f"--workdir={workdir}", "--repo=me/model", code=code)
    assert told in error and f"({status}: told by the hub)" in error


def test_without_a_token_or_with_a_wrong_one_the_way_is_to_log_in(
    workdir, hub, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    flags = (f"--workdir={workdir}", "--repo=me/model")
    assert "hf auth login" in refused(capsys, *flags)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    requests = len(hub.requests)
    assert "no token" in refused(capsys, *flags) and len(hub.requests) == requests


def test_a_hub_that_is_not_there_is_one_line(workdir, hub, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    flags = (f"--workdir={workdir}", "--repo=me/model")
    assert "cannot be reached" in refused(capsys, *flags, code=68)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(capsys, *flags, code=68)


def test_flags_that_cannot_be_used_are_refused(workdir, capsys):
    repo, run = "--repo=me/model", f"--workdir={workdir}"
    for name in ("model", "me/model/x", "me/mo del", "me/-model", "--/"):
        assert "is no name on the hub" in refused(capsys, run, f"--repo={name}")
    assert "--workdir" in refused(capsys, repo)
    assert "--format and --export" in refused(capsys, repo, "--format=peft", "--export=x")
    assert "is no hub id" in refused(capsys, run, repo, "--base_model=/home/me/base")
    assert "--license" in refused(capsys, run, repo, "--license=Apache 2")
    assert "no such folder" in refused(capsys, run, repo, "--format=merged")


@pytest.mark.parametrize("fault", ["missing", "no record", "damaged", "outside"])
def test_a_folder_that_is_no_complete_export_is_refused(workdir, capsys, fault):
    export = workdir / "export" / "peft"
    record = export / "lljax_export.json"
    if fault == "missing":
        (export / "adapter_model.safetensors").unlink()
    elif fault == "no record":
        record.unlink()
    elif fault == "damaged":
        record.write_text("{")
    else:
        content = json.loads(record.read_text())
        record.write_text(json.dumps(content | {"files": ["../../config.json"]}))
    told = {
        "missing": "adapter_model.safetensors is missing",
        "no record": "holds no export that lljax recorded",
        "damaged": "lljax_export.json is damaged",
        "outside": "is outside the folder",
    }
    error = refused(capsys, f"--workdir={workdir}", "--repo=me/model", "--dry_run")
    assert told[fault] in error and not card(workdir).exists()


def test_an_export_of_another_base_is_refused(workdir, capsys):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["path"] = "org/other"
    (workdir / "config.json").write_text(json.dumps(config))
    error = refused(capsys, f"--workdir={workdir}", "--repo=me/model", "--dry_run")
    assert "'org/other'" in error
    export = workdir / "export" / "peft"
    main([f"--export={export}", "--repo=me/model", "--dry_run"])  # without the run
    assert "## Training" not in card(workdir).read_text()


def test_the_license_is_of_the_base_or_said_to_be_unknown(workdir, hub, tiny, capsys):
    flags = [f"--workdir={workdir}", "--repo=me/model", "--dry_run"]
    main(flags)
    assert "license of the base is not known" in capsys.readouterr().out
    assert "\nlicense:" not in card(workdir).read_text()
    (card(workdir).parent / "LICENSE").write_text("   Apache License\n   Version 2.0, January 2004")
    main(flags)
    assert "\nlicense: apache-2.0\n" in card(workdir).read_text()
    base = workdir.parent / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\n---\n")
    record = workdir / "export" / "peft" / "lljax_export.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base": str(base)}))
    main([f"--export={record.parent}", *flags[1:]])
    assert "license: other\nlicense_name: tiny\n" in card(workdir).read_text()
