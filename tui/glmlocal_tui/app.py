"""The app: lays out the widgets, owns the few things that change, and turns messages into what happens."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen

from glmlocal_tui import commands, mentions, settings
from glmlocal_tui.answer_runner import AnswerRunner
from glmlocal_tui.answering import Answering
from glmlocal_tui.cleaning import one_line
from glmlocal_tui.client import Client, Sampling
from glmlocal_tui.command_runner import CommandRunner
from glmlocal_tui.compositor import ChatScreen
from glmlocal_tui.connection import LOADS, LOST, NO_KEY, READY, STARTING, Connection, ServerState
from glmlocal_tui.conversation import Attachment, Conversation, Message, user_message
from glmlocal_tui.keeper import Keeper
from glmlocal_tui.messages import (
    BranchStep,
    CopyRequested,
    EarlierRequested,
    EditRequested,
    RegenerateRequested,
    ServerChanged,
    SessionChosen,
    Submitted,
    TypedOutside,
)
from glmlocal_tui.options import Options
from glmlocal_tui.render import warm_up
from glmlocal_tui.server_process import ServerProcess
from glmlocal_tui.store import Store
from glmlocal_tui.widgets.banner import Banner
from glmlocal_tui.widgets.composer import Composer
from glmlocal_tui.widgets.dashboard import Dashboard, Measured
from glmlocal_tui.widgets.jump import Jump
from glmlocal_tui.widgets.prompt import Prompt
from glmlocal_tui.widgets.sidebar import Sidebar
from glmlocal_tui.widgets.start import StartView
from glmlocal_tui.widgets.status_bar import Status, StatusBar
from glmlocal_tui.widgets.transcript import SHOWN, Transcript

TINY, WIDE = 66, 100  # columns from which on a panel covers no conversation, and stays when one was chosen


class ChatApp(App[int]):
    TITLE = "glmlocal chat"
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (TINY, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012 - Textual's own declaration
    CSS = """
    #all { layers: base above; }
    #main { width: 1fr; min-width: 10; }
    #talk { height: 1fr; }
    Transcript { display: none; }
    Screen.-tiny Dashboard, Screen.-tiny Sidebar { dock: left; layer: above; width: 100%; min-width: 10; border: none; }
    VerticalScroll, OptionList, TextArea { scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "command('help')", "Help", priority=True),
        Binding("f2", "command('load')", "Conversations", priority=True),
        Binding("f3", "command('search')", "Search", priority=True),
        Binding("f4", "command('stats')", "Dashboard", priority=True),
        Binding("f5", "command('settings')", "Settings", priority=True),
        Binding("f6", "command('edit')", "Edit last message", priority=True),
        Binding("f7", "command('copy')", "Copy answer", priority=True),
        Binding("ctrl+n", "command('new')", "New conversation", priority=True),
        Binding("ctrl+r", "command('regenerate')", "Answer again", priority=True),
        Binding("escape", "escape", "Stop", show=False),
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self._target = one_line(options.target)
        loaded = settings.load(options.settings_path)
        self.settings, self._settings_problem = loaded.settings, loaded.problem
        self.client = Client(options.url, options.key)
        process = ServerProcess(options.command) if options.command else None
        self.connection = Connection(self.client, process, lambda state: self.post_message(ServerChanged(state)))
        self.keeper = Keeper(Store(options.data_dir / "sessions.db"), self._store_told)
        self.commands = CommandRunner(self)
        self.conversation = self.new_conversation()
        self.model = one_line(options.model)
        self.sampling = self._sampling()
        self.answers = AnswerRunner(self)
        self.editing: Message | None = None  # the message that the prompt's text will take the place of
        self._leaving = False

    def get_default_screen(self) -> Screen[None]:
        return ChatScreen()

    def compose(self) -> ComposeResult:
        with Horizontal(id="all"):
            yield Sidebar()
            with Vertical(id="main"):
                with Vertical(id="talk"):
                    yield StartView(self._target)
                    yield Transcript()
                yield Jump()
                yield Banner()
                yield Composer(self.options.root, self.commands.choices)
                yield StatusBar()
            yield Dashboard()

    def on_mount(self) -> None:
        if self.settings.theme in self.available_themes:
            self.theme = self.settings.theme
        self.query_one(Dashboard).set_class(self.settings.dashboard, "-shown")
        self.query_one(Sidebar).set_class(self.settings.sidebar, "-shown")
        self.query_one(Transcript).keep_thinking_open = self.settings.keep_thinking_open
        self.query_one(Banner).tell("settings", self._settings_problem)
        self.query_one(Prompt).focus()
        self.call_after_refresh(self._begin)
        self.set_interval(1.0, self._tick)
        self.set_interval(0.25, self.update_status)

    @work(group="life")
    async def _begin(self) -> None:
        """What may take a while, after the first paint."""
        self.run_worker(self.connection.run(), group="life")
        transcript = self.query_one(Transcript)  # now: the app may be closing when the others have ended
        self.query_one(Prompt).use_history(await self.keeper.open())
        self.run_worker(self.keeper.run(), group="life")
        await self.show_sessions()
        await transcript.make_ready()
        await asyncio.to_thread(warm_up)

    # -- the server

    def on_server_changed(self, event: ServerChanged) -> None:
        if self.query_one_optional(StatusBar) is None:  # the app is closing
            return
        state = event.state
        self.query_one(StartView).show(state)
        text = {READY: "", STARTING: "starting the server …"}.get(state.phase, state.problem)
        if state.phase == LOADS and state.stats and state.stats.loading:
            loading = state.stats.loading
            share = loading.done_bytes / loading.total_bytes if loading.total_bytes else 0.0
            text = f"loading the model: {share:.0%}"
        talking = bool(self.conversation.messages)
        self.query_one(Banner).tell("server", text if talking or state.phase in (LOST, NO_KEY) else "")
        self.update_status()

    @property
    def answering(self) -> Answering | None:
        """The answer that is being written."""
        return self.answers.answering

    @property
    def state(self) -> ServerState:
        return self.connection.state

    @property
    def model_name(self) -> str:
        return self.model or (self.state.models[0] if self.state.models else "")

    def update_status(self) -> None:
        if self.query_one_optional(StatusBar) is None:  # the app is closing
            return
        answering, state = self.answering, self.state
        thinks = state.stats is None or state.stats.model.supports_thinking
        phase = "answering" if answering and answering.tokens else "waiting" if answering else state.phase
        rate = answering.tokens_per_s if answering else self.answers.measured.tokens_per_s
        thinking = self.sampling.thinking if thinks else None
        used = self.context_used()
        status = Status(self.model_name or self._target, phase, thinking, used, state.context, rate)
        self.query_one(StatusBar).show(status)
        first = answering.first_token_s if answering else self.answers.measured.first_token_s
        self.query_one(Dashboard).show(state.stats, Measured(rate, first, used))
        self.query_one(Jump).show(bool(self.conversation.messages) and not self.query_one(Transcript).follows)

    def context_used(self) -> int:
        """Tokens of the shown branch, as far as its last finished answer; what is being written is counted on top."""
        usages = [message.usage for message in self.conversation.path() if message.usage is not None]
        used = usages[-1].prompt_tokens + usages[-1].completion_tokens if usages else 0
        return used + (self.answering.tokens if self.answering else 0)

    def _tick(self) -> None:
        dashboard = self.query_one_optional(Dashboard)  # None: the app is closing
        if dashboard is not None:
            dashboard.tick(self.answering.tokens_per_s if self.answering else 0.0)

    # -- writing and answering

    async def on_submitted(self, event: Submitted) -> None:
        prompt = self.query_one(Prompt)
        call = commands.parse(event.text)
        if isinstance(call, str):
            self.say(call, problem=True)
            return
        if call is not None:
            self.remember(event.text)
            prompt.set_text("")
            await self.commands.run(call)
            return
        if not event.text.strip():
            return
        if self.answering is not None:
            self.say("the answer is still being written: Esc stops it")
            return
        text = event.text[1:] if event.text.startswith("//") else event.text
        try:
            pastes = prompt.pastes()
            files = "@" in text
            attachments = await asyncio.to_thread(self._attachments, text, pastes) if files else _pasted(pastes)
        except ValueError as error:
            self.say(str(error), problem=True)
            return
        self.remember(event.text)
        prompt.set_text("")
        await self._send(text, attachments)

    async def _send(self, text: str, attachments: list[Attachment]) -> None:
        editing, self.editing = self.editing, None
        self.query_one(Banner).tell("editing", "")
        parent = editing.parent_id if editing is not None else self.conversation.leaf
        message = user_message(parent, text, attachments)
        self.conversation.add(message)
        self.keeper.changed(self.conversation, message)
        self.answers.start(message.id, message)

    def _attachments(self, text: str, pastes: dict[str, str]) -> list[Attachment]:
        """The files and pastes of a text. Raises ValueError for a file that cannot be sent."""
        found = mentions.find(text, self.options.root)
        files = [mentions.read(mention, self.options.root) for mention in found]
        return files + _pasted(pastes)

    # -- what is on the screen

    def new_conversation(self) -> Conversation:
        system = self.settings.system if self.options.system is None else self.options.system
        return Conversation(system=system)

    async def show_new(self, *messages: Message) -> None:
        """The conversation in the place of the start screen, with new messages at its end, or of another branch."""
        if any(len(self.conversation.siblings(message.id)) > 1 for message in messages):
            await self.show_conversation()
        else:
            self._show_talk()
            await self.query_one(Transcript).add(self.conversation, messages)

    def _show_talk(self) -> None:
        """The conversation in the place of the start screen. A class of the screen would renew every widget's style."""
        talking = bool(self.conversation.messages)
        self.query_one(StartView).display, self.query_one(Transcript).display = not talking, talking

    async def show_conversation(self, message_id: str = "") -> None:
        """Draw the open conversation anew, and go to a message of it (else: its end)."""
        transcript = self.query_one(Transcript)
        self._show_talk()
        ids = [message.id for message in self.conversation.path()]
        place = ids.index(message_id) if message_id in ids else None
        first = None if place is None else min(max(place - 2, 0), max(len(ids) - SHOWN, 0))
        await transcript.show(self.conversation, first)
        view = transcript.view_of(message_id) if message_id else None
        if view is not None:
            view.focus()
            view.scroll_visible(animate=False, top=True)
        else:
            transcript.follow()
        self.update_status()

    async def show_sessions(self) -> None:
        sidebar = self.query_one_optional(Sidebar)  # None: the app is closing
        if sidebar is not None and sidebar.has_class("-shown"):
            await self.keeper.flush()
            sidebar.show(await self.keeper.ask(self.keeper.store.sessions, []), self.conversation.id)

    async def on_session_chosen(self, event: SessionChosen) -> None:
        await self.commands.open_session(event.session_id, event.message_id)

    async def on_branch_step(self, event: BranchStep) -> None:
        await self.answers.stop()
        chosen = event.message_id
        question = self.conversation.messages[chosen].parent_id
        if question is not None and len(self.conversation.siblings(chosen)) == 1:  # its question may have branches
            chosen = question
        if self.conversation.switch(chosen, event.step):
            self.keeper.changed(self.conversation)
            await self.show_conversation()

    async def on_earlier_requested(self, event: EarlierRequested) -> None:
        transcript = self.query_one(Transcript)
        path = self.conversation.path()
        top = path[max(len(path) - transcript.drawn(), 0)].id
        await transcript.show(self.conversation, len(path) - transcript.drawn() - SHOWN)
        view = transcript.view_of(top)
        if view is not None:
            transcript.release_anchor()
            view.scroll_visible(animate=False, top=True)

    async def on_edit_requested(self, event: EditRequested) -> None:
        await self.commands.edit_message(event.message_id)

    async def on_regenerate_requested(self, event: RegenerateRequested) -> None:
        await self.commands.answer_again(event.message_id)

    def on_typed_outside(self, event: TypedOutside) -> None:
        prompt = self.query_one(Prompt)
        prompt.focus()
        prompt.insert(event.character)

    def on_copy_requested(self, event: CopyRequested) -> None:
        self.copy_to_clipboard(event.text)
        self.say(f"{event.what} copied ({len(event.text):,} characters)")

    def say(self, text: str, *, problem: bool = False) -> None:
        """A short-lived line in the corner. Never markup: the text may be anybody's."""
        self.notify(one_line(text, 600), severity="error" if problem else "information", markup=False)

    # -- keys

    async def action_command(self, name: str) -> None:
        await self.commands.run_name(name)

    async def action_escape(self) -> None:
        if self.editing is not None:
            self.editing = None
            self.query_one(Banner).tell("editing", "")
            self.query_one(Prompt).set_text("")
        elif self.answering is not None:
            await self.answers.stop()
        self.query_one(Prompt).focus()

    def action_scroll_page(self, step: int) -> None:
        transcript = self.query_one(Transcript)
        if step > 0:
            transcript.scroll_page_down(animate=False)
        elif transcript.scroll_y > 0:
            transcript.scroll_page_up(animate=False)
        else:
            transcript.reach_up()

    def action_scroll_to(self, end: int) -> None:
        transcript = self.query_one(Transcript)
        if end:
            transcript.follow()
        elif transcript.scroll_y > 0:
            transcript.scroll_home(animate=False)
        else:
            transcript.reach_up()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The command palette has what the slash commands have, and Textual's own."""
        for command in commands.COMMANDS:
            title = f"{command.help[0].upper()}{command.help[1:]}"
            yield SystemCommand(f"/{command.name}", title, lambda name=command.name: self.commands.start(name))

    # -- leaving

    async def action_quit(self) -> None:
        """Leave when everything is saved; the second time, whatever is not."""
        await self.answers.stop()
        saved = await self.keeper.flush()
        if not saved and not self._leaving:
            self._leaving = True
            self.say(
                "this conversation is not saved: Ctrl+Q again leaves without it, /export FILE.md keeps it", problem=True
            )
            return
        self.exit(0)

    async def aclose(self) -> None:
        """After the screen is gone: what is not saved, the server of our own, the connection, the file."""
        await self.keeper.flush()
        await self.connection.aclose()
        await asyncio.to_thread(self.keeper.store.close)

    def remember(self, text: str) -> None:
        self.query_one(Prompt).remember(text)
        self.keeper.remember(text)

    def keep_settings(self, **changes: object) -> None:
        """Change settings now and for the next time."""
        self.settings = replace(self.settings, **changes)  # type: ignore[arg-type]
        self.sampling = self._sampling()
        try:
            settings.save(self.options.settings_path, self.settings)
        except OSError as error:
            self.say(f"the settings are not kept: {error.strerror or error}", problem=True)

    def _sampling(self) -> Sampling:
        given, kept = self.options.sampling, self.settings
        return replace(
            given,
            temperature=kept.temperature if given.temperature is None else given.temperature,
            top_p=kept.top_p if given.top_p is None else given.top_p,
            max_tokens=kept.max_tokens if given.max_tokens is None else given.max_tokens,
            thinking=kept.thinking if given.thinking is None else given.thinking,
        )

    def _store_told(self, text: str) -> None:
        with contextlib.suppress(Exception):  # the screen may be gone while the last save runs
            self.query_one(Banner).tell("store", text)

    def _fatal_error(self) -> None:
        """A bug of ours: one line and a file instead of a traceback on the terminal."""
        self._exit_renderables.clear()
        path = self._write_crash()
        self.exit(1, 1, message=f"glmlocal chat: a bug of ours ended the app; the details are in {path}")

    def _write_crash(self) -> Path:
        path = self.options.data_dir / "crash.log"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            error = self._exception
            path.write_text("".join(traceback.format_exception(error)) if error else "", encoding="utf-8")
        return path


def _pasted(pastes: dict[str, str]) -> list[Attachment]:
    return [Attachment("paste", token, text) for token, text in pastes.items()]
