"""The files of launch/: their syntax, what they have in common, and what the scripts do, with programs of the test's
own in the place of badloss and gcloud."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

LAUNCH = Path("launch")
SCRIPTS = [
    ".ci/run",
    ".ci/newest",
    *sorted(str(path) for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch")),
]
MANIFESTS = sorted(LAUNCH.glob("gke/*.yaml"))
JOB_SETS = [path for path in MANIFESTS if "kind: JobSet" in path.read_text("utf-8")]
STARTERS = ["local.sh", "slurm/run.sbatch", "gke/gpu.yaml", "gke/tpu.yaml", "tpu_vm/run.sh"]


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def jobs(path):
    return [job for document in documents(path) for job in document["spec"]["replicatedJobs"]]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="missing: Debian's package shellcheck")
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script):
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR:.", "--shell=bash", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if not script.endswith("settings.sh"):
        assert Path(script).read_text("utf-8").startswith("#!/usr/bin/env bash\n")


def test_scripts_can_be_started():
    for path in LAUNCH.rglob("*.sh"):
        assert os.access(path, os.X_OK) == path.read_text("utf-8").startswith("#!"), path


@pytest.mark.parametrize("dockerfile", [str(path) for path in LAUNCH.rglob("Dockerfile*")])
def test_images_pass_hadolint(dockerfile):
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), dockerfile],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1.31", "1.34"])
@pytest.mark.parametrize("path", MANIFESTS, ids=str)
def test_manifests_follow_the_schemas_of_kubernetes(path, version):
    for document in documents(path):
        if document["kind"] != "JobSet":
            kubernetes_validate.validate(document, version, strict=True)
            continue
        for job in document["spec"]["replicatedJobs"]:
            as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
            kubernetes_validate.validate(as_job, version, strict=True)


@pytest.mark.parametrize("path", JOB_SETS, ids=str)
def test_job_sets_follow_the_schema_of_job_set(path):
    (document,) = documents(path)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    # What the schema does not know is lost on the way; so is an empty dictionary.
    assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


@pytest.mark.parametrize("path", JOB_SETS, ids=str)
def test_job_sets_stop_on_wrong_usage_and_restart_as_a_whole(path):
    (document,) = documents(path)
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobs(path)
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    on_exit = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert (rule["action"], rule["onExitCodes"]) == ("FailJob", on_exit)
    assert pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"medium": "Memory", "sizeLimit": "16Gi"} in [volume.get("emptyDir") for volume in pod["volumes"]]
    created = {(document["kind"], document["metadata"]["name"]) for path in MANIFESTS for document in documents(path)}
    assert ("ServiceAccount", pod["serviceAccountName"]) in created
    assert ("PersistentVolumeClaim", pod["volumes"][0]["persistentVolumeClaim"]["claimName"]) in created


@pytest.mark.parametrize("name", STARTERS)
def test_every_platform_starts_the_same_command_with_the_same_settings(name):
    text = (LAUNCH / name).read_text("utf-8")
    assert text.count('badloss run --distributed "$@"') == 1
    assert len(re.findall(r'\. (launch/|"\$\(dirname "\$0"\)/)settings\.sh', text)) == 1


def test_the_readme_names_every_file():
    readme = (LAUNCH / "README.md").read_text("utf-8")
    for path in LAUNCH.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert f"({path.relative_to(LAUNCH)})" in readme, path


def program(folder, name, code):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}", "utf-8")
    path.chmod(0o755)


@pytest.fixture
def start(tmp_path):
    """Starts a script of launch/, with the programs in tmp_path first on the PATH."""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SHARE": "10.0.0.2:/share",
                                "SECONDS_BETWEEN_LOOKS": "0.1"}  # fmt: skip
    started = []

    def start(script, *arguments):
        started.append(subprocess.Popen([LAUNCH / script, *arguments], env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate()


BADLOSS = """\
import os, pathlib, signal, sys, time
process = sys.argv[sys.argv.index("--process_id") + 1]
folder = pathlib.Path(__file__).parent
def preempted(*_):
    time.sleep(float(process) / 2)
    (folder / f"stopped-{process}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else preempted)
(folder / f"started-{process}").write_text(f"{sys.argv[1:]} {os.environ['JAX_LOCAL_DEVICE_IDS']}")
if process == "1" and "fail" in sys.argv:
    sys.exit(3)
if "wait" in sys.argv:
    time.sleep(100)
"""


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_local_starts_all_processes_with_one_coordinator(start, tmp_path):
    program(tmp_path, "badloss", BADLOSS)
    done = start("local.sh", "3", "--config", "a b")
    assert done.wait(20) == 0
    ports = set()
    for i in range(3):
        text = (tmp_path / f"started-{i}").read_text()
        found = re.fullmatch(
            r"\['run', '--distributed', '--config', 'a b', '--coordinator', 'localhost:(\d+)', "
            rf"'--num_processes', '3', '--process_id', '{i}'\] {i}", text)  # fmt: skip
        assert found, text
        ports.add(found[1])
    assert len(ports) == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_stops_all_processes_and_lets_them_finish(sent, start, tmp_path):
    program(tmp_path, "badloss", BADLOSS)
    running = start("local.sh", "3", "wait")
    wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 3)
    running.send_signal(sent)
    assert running.wait(20) == 75
    assert len(list(tmp_path.glob("stopped-*"))) == 3


@pytest.mark.parametrize("others", ["wait", "deaf"])
def test_local_ends_the_others_when_one_fails(others, start, tmp_path):
    program(tmp_path, "badloss", BADLOSS)
    begin = time.monotonic()
    running = start("local.sh", "3", "fail", "wait", others)
    assert running.wait(30) == 3
    assert (time.monotonic() - begin > 10) == (others == "deaf")


@pytest.mark.parametrize("number", [[], ["0"], ["--config"]])
def test_local_says_how_to_use_it(number, start):
    running = start("local.sh", *number)
    assert running.wait(20) == 2
    assert "usage: launch/local.sh N" in running.stdout.read()


GCLOUD = """\
import pathlib, sys
folder = pathlib.Path(__file__).parent
state, log, answers = folder / "state", folder / "log", folder / "answers"
command = " ".join(sys.argv[1:])
verb = next(word for word in ("describe", "create", "delete", "scp", "ssh") if word in sys.argv)
if verb == "ssh":
    verb = "train" if "badloss run" in command.replace("\\\\", "") else "install"
with log.open("a") as file:
    print(verb, file=file)
if verb == "describe":
    if not state.exists():
        sys.exit("ERROR: NOT_FOUND: Resource was not found")
    print(state.read_text())
    if state.read_text() == "WAITING_FOR_RESOURCES":
        state.write_text("ACTIVE")
elif verb == "create":
    state.write_text("WAITING_FOR_RESOURCES")
elif verb == "delete":
    state.unlink(missing_ok=True)
elif verb == "train":
    (folder / "command").write_text(sys.argv[-1].removeprefix("--command="))
    code, after, *rest = answers.read_text().split()
    answers.write_text(" ".join(rest))
    state.write_text(after)
    sys.exit(int(code))
"""
ROUND = ["install", "train"]


@pytest.mark.parametrize(
    ("answers", "code", "expected"),
    [
        ("0 ACTIVE", 0, ["create", *ROUND, "delete"]),
        ("2 ACTIVE", 2, ["create", *ROUND, "delete"]),
        ("1 ACTIVE", 1, ["create", *ROUND, "delete"]),
        ("75 ACTIVE 0 ACTIVE", 0, ["create", *ROUND, *ROUND, "delete"]),
        ("255 SUSPENDED 134 SUSPENDED 0 ACTIVE", 0,
         ["create", *ROUND, "delete", "create", *ROUND, "delete", "create", *ROUND, "delete"]),
    ],
)  # fmt: skip
def test_tpu_vm_goes_on_until_it_is_done(answers, code, expected, start, tmp_path):
    program(tmp_path, "gcloud", GCLOUD)
    (tmp_path / "answers").write_text(answers)
    running = start("tpu_vm/run.sh", "--workdir", "OUT")
    assert running.wait(30) == code, running.stdout.read()
    assert [line for line in (tmp_path / "log").read_text().split() if line not in ("describe", "scp")] == expected
    assert not (tmp_path / "state").exists()


def test_tpu_vm_passes_the_arguments_on_as_they_are(start, tmp_path):
    """What the workers' shells are given starts badloss with the very arguments."""
    program(tmp_path, "gcloud", GCLOUD)
    program(tmp_path, "badloss", "import sys; print(sys.argv[1:])")
    (tmp_path / "answers").write_text("0 ACTIVE")
    arguments = ["--workdir", "a 'b'", "--config.attacks.names=('patch','blend_p')"]
    running = start("tpu_vm/run.sh", *arguments)
    assert running.wait(30) == 0
    home = tmp_path / "home" / "badloss_jax"
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/activate").touch()
    (home / "launch").symlink_to(LAUNCH.absolute())
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", (tmp_path / "command").read_text()],
                          cwd=home.parent, env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == str(["run", "--distributed", *arguments])


def test_tpu_vm_shows_what_it_would_do(start, tmp_path):
    program(tmp_path, "gcloud", "raise SystemExit('called')")
    running = start("tpu_vm/run.sh", "--dry-run", "--config", "c")
    assert running.wait(20) == 0
    shown = running.stdout.read().splitlines()
    words = ("queued-resources create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "queued-resources delete")
    assert [word in line for word, line in zip(words, shown, strict=True)] == [True] * 5
