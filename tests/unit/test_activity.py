"""Judgement: which Activities are run, and in which words the others are told why not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.activity import Activity, Entity, NotReady, Ready, Upload, history, key, readiness

SUFFIXES = (".sif", ".simg")


def revision(name: str, upload: Upload = Upload.COMPLETE, created_at: str = "", entity_id: str = "") -> Entity:
    return Entity(entity_id or f"id of {name}", "Revision", name, upload, created_at)


READS, IMAGE = revision("reads.fastq"), revision("align.sif")
ACTIVITY = Activity("a", 0, "Align", "p", inputs=(READS,), related=(IMAGE, revision("notes.txt")))


def ready(judgement: Ready | NotReady) -> Ready:
    assert isinstance(judgement, Ready), judgement
    return judgement


def not_ready(judgement: Ready | NotReady) -> NotReady:
    assert isinstance(judgement, NotReady)
    return judgement


def test_inputs_and_one_image_are_enough() -> None:
    plan = ready(readiness(ACTIVITY, SUFFIXES)).plan
    assert [file.file_name for file in plan.inputs] == ["reads.fastq"]
    assert plan.image.entity_id == IMAGE.id
    assert {file.name for file in plan.related} == {"align.sif", "notes.txt"}


@pytest.mark.parametrize(
    ("activity", "reason", "waiting"),
    [
        (replace(ACTIVITY, inputs=()), "the Activity has no inputs", False),
        (
            replace(ACTIVITY, related=()),
            "no related file is a compute image (a name that ends in .sif, .simg)",
            False,
        ),
        (
            replace(ACTIVITY, related=(IMAGE, revision("b.sif"), revision("C.SIMG"))),
            "3 images among the related files and no compute.image property names one: C.SIMG, align.sif, b.sif",
            False,
        ),
        (
            replace(ACTIVITY, properties={"compute.image": ("other.sif",)}),
            "compute.image: no related file is named other.sif; the related files are: align.sif, notes.txt",
            False,
        ),
        (
            replace(ACTIVITY, properties={"compute.image": ("b.sif", "align.sif")}),
            "the property compute.image has several values: align.sif, b.sif; keep one of them",
            False,
        ),
        (
            replace(ACTIVITY, properties={"compute.auto": ("true", "False")}),
            "the property compute.auto switches automatic runs off; somebody may still ask for one",
            False,
        ),
        (
            replace(ACTIVITY, properties={"compute.auto": ("perhaps",)}),
            "the property compute.auto is perhaps, which is neither true nor false",
            False,
        ),
        (
            replace(ACTIVITY, inputs=(READS, revision("reads_2.fastq", Upload.IN_PROGRESS))),
            "waiting for reads_2.fastq to finish uploading",
            True,
        ),
        (
            replace(ACTIVITY, related=(revision("align.sif", Upload.IN_PROGRESS),)),
            "waiting for align.sif to finish uploading",
            True,
        ),
        (
            replace(ACTIVITY, inputs=(revision("broken.csv", Upload.ERROR),)),
            "the upload of broken.csv failed: upload it again or remove it",
            False,
        ),
    ],
)
def test_why_not(activity: Activity, reason: str, waiting: bool) -> None:
    judgement = not_ready(readiness(activity, SUFFIXES))
    assert judgement.reasons == (reason,)
    assert judgement.waiting is waiting


def test_the_newest_of_two_images_of_one_name_is_run() -> None:
    old = revision("align.sif", created_at="2026-01-01T00:00:00Z", entity_id="old")
    new = revision("align.sif", created_at="2026-02-01T00:00:00Z", entity_id="new")
    for related in ((old, new), (new, old)):
        plan = ready(readiness(replace(ACTIVITY, related=related), SUFFIXES)).plan
        assert plan.image.entity_id == "new"
        assert len({file.file_name for file in plan.related}) == 2


def test_a_related_file_that_is_not_whole_does_not_hold_the_run_up() -> None:
    related = (IMAGE, revision("huge.bam", Upload.IN_PROGRESS))
    plan = ready(readiness(replace(ACTIVITY, related=related), SUFFIXES)).plan
    assert [file.name for file in plan.related] == ["align.sif"]


def test_a_person_may_name_any_related_file() -> None:
    plan = ready(readiness(ACTIVITY, SUFFIXES, image_name="notes.txt")).plan
    assert plan.image.name == "notes.txt"
    judgement = not_ready(readiness(ACTIVITY, SUFFIXES, image_name="other.sif"))
    assert judgement.reasons == ("no related file is named other.sif; the related files are: align.sif, notes.txt",)


def test_a_property_chooses_among_images() -> None:
    related = (IMAGE, revision("b.sif"))
    for wanted in ("b.sif", " b.sif "):
        activity = replace(ACTIVITY, related=related, properties={"compute.image": (wanted, "b.sif")})
        assert ready(readiness(activity, SUFFIXES)).plan.image.name == "b.sif"


def test_a_person_may_ask_for_a_run_that_would_not_start_by_itself() -> None:
    activity = replace(ACTIVITY, properties={"compute.auto": ("false",), "compute.image": ("nothing.sif",)})
    assert ready(readiness(activity, SUFFIXES, image_name="align.sif")).plan.image.name == "align.sif"


def test_a_source_is_given_as_json() -> None:
    mouse = Entity("s1", "Source", "mouse 7", Upload.COMPLETE)
    plan = ready(readiness(replace(ACTIVITY, inputs=(mouse, READS)), SUFFIXES)).plan
    assert [file.file_name for file in plan.inputs] == ["mouse 7.source.json", "reads.fastq"]


ids = st.sets(st.sampled_from("abcdef"), min_size=1)


@given(ids, st.sampled_from("XY"), st.lists(st.tuples(ids, st.sampled_from("XY")), max_size=6))
def test_a_run_starts_by_itself_exactly_when_something_was_gained(
    inputs: set[str], image: str, earlier: list[tuple[set[str], str]]
) -> None:
    activity = Activity(
        "a",
        0,
        "n",
        "p",
        inputs=tuple(revision(each, entity_id=each) for each in sorted(inputs)),
        related=(revision("i.sif", entity_id=image),),
    )
    ran = [frozenset(each | {one}) for each, one in earlier]
    judgement = readiness(activity, SUFFIXES, ran)
    gained = (inputs | {image}) - set().union(*ran)
    assert isinstance(judgement, Ready) is bool(gained)
    assert isinstance(readiness(activity, SUFFIXES, ran, image_name="i.sif"), Ready)


def test_what_was_there_before_the_agent_starts_nothing() -> None:
    installed_at = datetime(2026, 5, 1, tzinfo=UTC)
    old = revision("old.csv", created_at="2026-04-30T23:59:59.000Z")
    image = revision("align.sif", created_at="2025-01-01T00:00:00Z")
    activity = Activity("a", 0, "n", "p", (old,), (image,), created_at="2025-01-01T00:00:00Z")
    before = history(activity, installed_at)
    assert before == {old.id, image.id}
    [reason] = not_ready(readiness(activity, SUFFIXES, history=before)).reasons
    assert reason.startswith("nothing new since the agent was installed")
    grown = replace(activity, inputs=(old, revision("new.csv", created_at="2026-05-02T00:00:00Z")))
    assert history(grown, installed_at) == before
    ready(readiness(grown, SUFFIXES, history=before))
    ready(readiness(activity, SUFFIXES, history=before, image_name="align.sif"))
    young = replace(activity, created_at="2026-05-01T00:00:00Z")
    assert history(young, installed_at) == frozenset()


def test_what_ran_is_remembered_by_inputs_and_image_alone() -> None:
    plan = ready(readiness(ACTIVITY, SUFFIXES)).plan
    assert key(plan) == {READS.id, IMAGE.id}
    more_related = replace(ACTIVITY, related=(*ACTIVITY.related, revision("more.txt")))
    assert not_ready(readiness(more_related, SUFFIXES, [key(plan)])).reasons[0].startswith("nothing new")
