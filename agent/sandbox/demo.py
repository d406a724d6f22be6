"""The main job on this machine, with nothing installed or configured but the agent and Apptainer.

A sandbox stands in for Ovation; the agent runs as the service that it is. A person's part is played through Ovation's
API: files are uploaded to an Activity, and seconds later the results are on the Activity.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from agent.sandbox.demo_errors import DemoFailed
from agent.sandbox.demo_home import Home
from agent.sandbox.demo_processes import Children
from agent.sandbox.demo_screen import Screen
from agent.sandbox.demo_services import Services
from agent.sandbox.demo_story import STAGES, Story
from agent.sandbox.sample.image import cache_directory, container_program
from agent.sandbox.sample.rootfs import SampleError

DEFAULT_OUTPUTS = Path("demo-outputs")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(*, keep: bool = False, directory: Path | None = None, outputs: Path | None = None) -> int:
    """Do the main job and show it; return 0 when the job succeeded and every output's bytes were verified.

    Everything lives in a new directory below `directory` (default: the system's for temporary files), which is
    removed at the end. The verified outputs are put into `outputs` (default: `./demo-outputs`). With `keep` all stays
    up until SIGINT or SIGTERM, and the directory stays after it. Returns 1 when something failed, and 128 + the
    signal's number when a signal ended it; no process is left in any case.
    """
    # botocore reads them in this process too, and a profile of a real account has no place in the sandbox.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    with suppress(KeyboardInterrupt):
        return asyncio.run(_supervised(keep, directory, (outputs or DEFAULT_OUTPUTS).absolute()))
    return 128 + signal.SIGINT


class _Interruption:
    """What signals ask for: the first to stop, any further one to hurry."""

    def __init__(self, screen: Screen) -> None:
        self.hurry = asyncio.Event()
        self.task: asyncio.Task[int] | None = None
        self.number: int | None = None
        self._screen = screen

    def listen(self) -> None:
        """Take the signals over from Python."""
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._receive, number)

    def _receive(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._screen.mute()
        if self.number is not None:
            self.hurry.set()
        elif self.task is not None:
            self.number = number
            self.task.cancel()
            self._screen.say("\nStopping the job, the agent and the sandbox. Again: without waiting for them.", "dim")


async def _supervised(keep: bool, directory: Path | None, outputs: Path) -> int:
    """Run the demo as a task that a signal cancels, and clean up after it whatever became of it.

    Nothing cancels this function itself, so that the cleaning up always comes to its end.
    """
    screen = Screen(STAGES)
    interruption = _Interruption(screen)
    interruption.listen()
    try:
        container_program()
        home = Home(directory, keep)
    except (DemoFailed, SampleError) as error:
        screen.say(f"error: {error}", "red")
        return 1
    services = Services(Children(), home, cache_directory())
    story = Story(services, screen, home.downloads, outputs)
    reaper = asyncio.create_task(services.children.reap())
    interruption.task = asyncio.create_task(_told(story, screen, keep))
    try:
        code = await interruption.task
    except asyncio.CancelledError:
        code = 128 + (interruption.number or signal.SIGINT)
    finally:
        try:
            await story.end(interruption.hurry)
        finally:
            left = await services.end(interruption.hurry)
            reaper.cancel()
            home.close()
    if left:
        screen.say(f"error: these processes do not end: {', '.join(map(str, left))}", "red")
        return code or 1
    screen.say(f"\nNothing is left running.{home.farewell()}", "dim")
    return code


async def _told(story: Story, screen: Screen, keep: bool) -> int:
    """Let the story happen, turn what goes wrong in it into words, and with `keep` wait to be cancelled."""
    code = 1
    with screen:
        try:
            code = await story.tell()
        except DemoFailed as error:
            screen.fail_open("failed")
            screen.close()
            screen.say(f"error: {error}", "red")
        except asyncio.CancelledError:
            screen.fail_open("interrupted")
            raise
    if keep:
        story.explain_what_is_kept()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    elif code == 0:
        story.say_how_to_see_more()
    return code
