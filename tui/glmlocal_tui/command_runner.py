"""What each command does. A command's method has its name; ``words`` is what was typed after it.

Screens are imported when they are opened: the first paint is not to wait for them.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from glmlocal_tui import commands, export, mentions
from glmlocal_tui.commands import Call
from glmlocal_tui.connection import READY
from glmlocal_tui.conversation import Conversation
from glmlocal_tui.settings import Settings, parse_number
from glmlocal_tui.widgets.banner import Banner
from glmlocal_tui.widgets.completions import Choice
from glmlocal_tui.widgets.dashboard import Dashboard
from glmlocal_tui.widgets.prompt import Prompt
from glmlocal_tui.widgets.sidebar import Sidebar
from glmlocal_tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from glmlocal_tui.app import ChatApp
    from glmlocal_tui.messages import SessionChosen
    from glmlocal_tui.store import Hit, Summary


class CommandRunner:
    def __init__(self, app: ChatApp) -> None:
        self._app = app
        self._deleted: list[str] = []  # ids, for /undo

    async def run(self, call: Call) -> None:
        await self.run_name(call.command.name, call.words)

    async def run_name(self, name: str, words: str = "") -> None:
        """For keys: also the two commands that only the sidebar has."""
        try:
            await getattr(self, f"do_{name}")(words)
        except ValueError as error:  # a sentence about the words, or about what is missing
            self._app.say(str(error), problem=True)

    def start(self, name: str) -> None:
        """For the palette: run a command, or begin to type it if it needs words."""
        command = commands.BY_NAME[name]
        if command.takes and not command.takes.startswith("["):
            prompt = self._app.query_one(Prompt)
            prompt.set_text(f"/{name} ")
            prompt.focus()
        else:
            self._app.run_worker(self.run_name(name))

    async def choices(self, before: str) -> list[Choice]:
        """What may complete the text before the cursor."""
        found = commands.complete(before)
        if found:
            return [
                Choice(
                    f"/{item.name}" + (" " if item.takes else ""),
                    len(before),
                    f"/{item.name} {item.takes}".strip(),
                    item.help,
                )
                for item in found
            ]
        if before.startswith("/") and "\n" not in before:
            name, _, words = before[1:].partition(" ")
            options = await self._words_for(name)
            fitting = [item for item in options if item.casefold().startswith(words.casefold()) and item != words]
            return [Choice(item, len(words), item) for item in fitting][:50]
        token = mentions.token_before(before)
        if token is None:
            return []
        replaces = len(before) - before.rindex("@")
        paths = await asyncio.to_thread(mentions.complete, token, self._app.options.root)
        if token in paths and not token.endswith("/"):  # it is complete: Enter sends
            return []
        return [Choice(mentions.quoted(path), replaces, path) for path in paths if path != token]

    async def _sessions(self) -> list[Summary]:
        none: list[Summary] = []
        return await self._app.keeper.ask(self._app.keeper.store.sessions, none)

    async def _words_for(self, name: str) -> list[str]:
        if name == "theme":
            return sorted(self._app.available_themes)
        if name == "model":
            return list(self._app.state.models)
        if name == "load":
            return [item.title for item in await self._sessions()]
        return ["code"] if name == "copy" else []

    # -- conversations

    async def do_new(self, words: str = "") -> None:
        await self._show(self._app.new_conversation())
        self._app.query_one(Prompt).focus()

    async def do_load(self, words: str) -> None:
        if words:
            sessions = await self._sessions()
            for same in (lambda title: title == words, lambda title: words.casefold() in title.casefold()):
                for item in sessions:
                    if same(item.title):
                        await self.open_session(item.id)
                        return
            raise ValueError(f"no conversation is called {words!r}; F3 searches their texts")
        sidebar = self._app.query_one(Sidebar)
        shown = not sidebar.has_class("-shown")
        sidebar.set_class(shown, "-shown")
        if shown:
            await self._app.show_sessions()
            sidebar.list.focus()
        else:
            self._app.query_one(Prompt).focus()

    async def open_session(self, id_: str, message_id: str = "") -> None:
        keeper = self._app.keeper
        await keeper.flush()
        conversation = await keeper.ask(lambda: keeper.store.load(id_), None)
        if conversation is None:
            self._app.say("that conversation is not there any more", problem=True)
            return
        if message_id in conversation.messages:
            conversation.show(message_id)
        await self._show(conversation, message_id)
        if not self._app.screen.has_class("-wide"):
            self._app.query_one(Sidebar).remove_class("-shown")
        if not message_id:
            self._app.query_one(Prompt).focus()

    async def do_search(self, words: str = "") -> None:
        from glmlocal_tui.screens.search import SearchScreen

        def opened(chosen: SessionChosen | None) -> None:
            if chosen is not None:
                self._app.post_message(chosen)

        async def find(text: str) -> list[Hit]:
            return await self._app.keeper.ask(lambda: self._app.keeper.store.search(text), [])

        await self._app.keeper.flush()
        if not isinstance(self._app.screen, SearchScreen):
            self._app.push_screen(SearchScreen(find, words), opened)

    async def do_rename(self, title: str) -> None:
        self._app.conversation.title = title
        self._app.keeper.changed(self._app.conversation)
        await self._app.show_sessions()
        self._app.say(f"this conversation is now called {title!r}")

    async def do_rename_chosen(self, words: str = "") -> None:
        from glmlocal_tui.screens.ask import AskScreen

        id_ = self._app.query_one(Sidebar).chosen()
        titles = {item.id: item.title for item in await self._sessions()}

        async def named(title: str | None) -> None:
            if title is None or id_ is None:
                return
            if id_ == self._app.conversation.id:
                self._app.conversation.title = title
            await self._app.keeper.ask(lambda: self._app.keeper.store.rename(id_, title), None)
            await self._app.show_sessions()

        if id_ in titles:
            self._app.push_screen(AskScreen("title", titles[id_]), named)

    async def do_delete(self, words: str = "") -> None:
        if not self._app.conversation.messages:
            raise ValueError("this conversation is empty")
        await self._delete(self._app.conversation.id)

    async def do_delete_chosen(self, words: str = "") -> None:
        id_ = self._app.query_one(Sidebar).chosen()
        if id_ is not None:
            await self._delete(id_)

    async def _delete(self, id_: str) -> None:
        keeper = self._app.keeper
        await self._app.answers.stop()
        await keeper.flush()
        await keeper.ask(lambda: keeper.store.delete(id_), None)
        self._deleted.append(id_)
        if id_ == self._app.conversation.id:
            await self.do_new()
        await self._app.show_sessions()
        self._app.say("deleted; /undo brings it back")

    async def do_undo(self, words: str = "") -> None:
        if not self._deleted:
            raise ValueError("nothing was deleted")
        id_, keeper = self._deleted.pop(), self._app.keeper
        await keeper.ask(lambda: keeper.store.restore(id_), None)
        await self.open_session(id_)
        await self._app.show_sessions()

    async def do_export(self, words: str) -> None:
        try:
            path = await asyncio.to_thread(export.write, self._app.conversation, words, self._app.options.root)
        except OSError as error:
            raise ValueError(f"{words} cannot be written: {error.strerror or error}") from None
        self._app.say(f"written: {path}")

    async def _show(self, conversation: Conversation, message_id: str = "") -> None:
        app = self._app
        await app.answers.stop()
        await app.keeper.flush()
        app.editing = None
        app.query_one(Banner).tell("editing", "")
        app.conversation = conversation
        await app.show_conversation(message_id)
        await app.query_one(Transcript).make_ready()
        await app.show_sessions()

    # -- messages

    async def do_regenerate(self, words: str = "") -> None:
        path = self._app.conversation.path()
        if not path:
            raise ValueError("there is nothing to answer yet")
        await self.answer_again(path[-1].id)

    async def answer_again(self, message_id: str) -> None:
        message = self._app.conversation.messages[message_id]
        await self._app.answers.stop()
        question = message.id if message.role == "user" else message.parent_id
        if question is not None:
            self._app.answers.start(question)

    async def do_edit(self, words: str = "") -> None:
        asked = [message for message in self._app.conversation.path() if message.role == "user"]
        if not asked:
            raise ValueError("there is no message to edit yet")
        await self.edit_message(asked[-1].id)

    async def edit_message(self, message_id: str) -> None:
        app = self._app
        await app.answers.stop()
        message = app.conversation.messages[message_id]
        app.editing = message
        pastes = {item.name: item.text for item in message.attachments if item.kind == "paste"}
        prompt = app.query_one(Prompt)
        prompt.set_text(message.content, pastes)
        prompt.focus()
        app.query_one(Banner).tell("editing", "editing: Enter sends it as another branch, Esc leaves it as it was")

    async def do_copy(self, words: str = "") -> None:
        answers = [message for message in self._app.conversation.path() if message.role == "assistant"]
        view = self._app.query_one(Transcript).view_of(answers[-1].id) if answers else None
        if view is None:
            raise ValueError("there is no answer to copy yet")
        if words not in ("", "code"):
            raise ValueError(f"/copy or /copy code; found {words!r}")
        await view.run_action("copy_code" if words else "copy")

    # -- the model and how it answers

    async def do_model(self, words: str = "") -> None:
        models = self._app.state.models
        if not words:
            self._app.say(f"models: {', '.join(models)}" if models else "the server has not told its models yet")
        elif words in models or self._app.state.phase != READY or not models:
            self._app.model = words
            self._app.update_status()
        else:
            raise ValueError(f"the server has no model {words!r}; it has {', '.join(models)}")

    async def do_think(self, words: str = "") -> None:
        self._set(thinking=True)

    async def do_nothink(self, words: str = "") -> None:
        self._set(thinking=False)

    async def do_system(self, words: str = "") -> None:
        conversation = self._app.conversation
        if words:
            conversation.system = words
            self._app.keeper.changed(conversation)
        self._app.say(f"system prompt: {conversation.system}" if conversation.system else "there is no system prompt")

    async def do_temp(self, words: str) -> None:
        self._set(temperature=parse_number("temperature", words))

    async def do_top_p(self, words: str) -> None:
        self._set(top_p=parse_number("top_p", words))

    async def do_max_tokens(self, words: str) -> None:
        self._set(max_tokens=parse_number("max_tokens", words))

    def _set(self, **changes: object) -> None:
        """For this run of the app; the settings screen is for good."""
        self._app.sampling = replace(self._app.sampling, **changes)  # type: ignore[arg-type]
        (name, value), *_ = changes.items()
        shown = {"True": "on", "False": "off", "None": "the model's own"}.get(str(value), value)
        self._app.say(f"{name.replace('_', ' ')}: {shown}")
        self._app.update_status()

    # -- the app

    async def do_stats(self, words: str = "") -> None:
        self._app.query_one(Dashboard).toggle_class("-shown")
        self._app.call_after_refresh(self._app.update_status)

    async def do_theme(self, words: str = "") -> None:
        if not words:
            self._app.search_themes()
        elif words in self._app.available_themes:
            self._app.theme = words
            self._app.keep_settings(theme=words)
        else:
            raise ValueError(f"there is no theme {words!r}; there are {', '.join(sorted(self._app.available_themes))}")

    async def do_settings(self, words: str = "") -> None:
        from glmlocal_tui.screens.settings import SettingsScreen

        def closed(new: Settings | None) -> None:
            if new is not None:
                fields = Settings.__dataclass_fields__
                self._app.keep_settings(**{name: getattr(new, name) for name in fields})
                self._app.query_one(Transcript).keep_thinking_open = new.keep_thinking_open
                self._app.update_status()

        if not isinstance(self._app.screen, SettingsScreen):
            self._app.push_screen(SettingsScreen(replace(self._app.settings, theme=self._app.theme)), closed)

    async def do_restart(self, words: str = "") -> None:
        if not self._app.connection.restart():
            raise ValueError("the server runs, or is not ours to start")

    async def do_web(self, words: str = "") -> None:
        command = f"{sys.executable} -m glmlocal_tui --url {self._app.client.url}"
        self._app.say(f"pip install textual-serve, then: textual serve {shlex.quote(command)}")

    async def do_help(self, words: str = "") -> None:
        from glmlocal_tui.screens.help import HelpScreen

        if not isinstance(self._app.screen, HelpScreen):
            self._app.push_screen(HelpScreen())

    async def do_quit(self, words: str = "") -> None:
        await self._app.action_quit()
