// A conversation, and the list of those before it.

import { parts, receive, requestBody, runs } from "./answer.js";
import { SettingsDialog } from "./controls.js";
import * as history from "./history.js";
import { Markdown, copy } from "./markdown.js";
import { PrecisionSlider, bytes, bytesAt, depth, named, rate } from "./precision.js";
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";

/** Level, speed and bytes of an answer; while it comes they are those of the last token. */
function Figures({ message, levels }) {
  const { stats } = message;
  if (!stats || stats.bits == null) return null;
  const all = runs(stats);
  const read = stats.bytes ?? bytesAt(levels, stats.bits);
  const path = all.length > 1 ? all.map((run) => named(run.bits)).join(" → ") : named(stats.bits);
  return html`<div class="figures">
    <span class="figure"><b>${path}</b>${stats.asked === "auto" ? " chosen by the server" : ""}</span>
    <span class="figure">${rate(stats.perSecond)} tokens/s</span>
    ${read != null && html`<span class="figure">${bytes(read)} read a token</span>`}
    <span class="figure">${stats.tokens} tokens</span>
    ${message.finish === "length" && html`<span class="note">cut at the limit of tokens</span>`}
    ${message.finish === "stopped" && html`<span class="note">stopped</span>`}
    ${all.length > 1 && html`<div class="levels" role="img" aria-label=${
      all.map((run) => `${run.tokens} tokens at ${named(run.bits)}`).join(", then ")}>
      ${all.map((run, i) => html`<i key=${i} style=${{ flexGrow: run.tokens, ...depth(levels, run.bits) }} />`)}
    </div>`}
  </div>`;
}

function Failure({ error, onRetry }) {
  const wait = error.retryAfter ? ` The server asks to wait ${error.retryAfter} s.` : "";
  return html`<div class="failure" role="alert"><span>${error.message}${wait}</span>
    ${onRetry && html`<button onClick=${onRetry}>Try again</button>`}</div>`;
}

function Message({ message, levels, running, last, actions }) {
  const [copied, setCopied] = useState(false);
  if (message.role === "user") {
    return html`<article class="message user" aria-label="You">
      <div class="bubble">${message.content}</div>
      ${last && !running && html`<div class="actions">
        <button class="quiet" onClick=${actions.edit}>Edit</button></div>`}
    </article>`;
  }
  const { reasoning, text } = parts(message);
  const onCopy = async () => {
    setCopied(await copy(text));
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<article class="message assistant" aria-label="Answer">
    ${reasoning && html`<details class="reasoning" open=${running && !text}>
      <summary>Reasoning</summary><${Markdown} text=${reasoning} /></details>`}
    ${text && html`<${Markdown} text=${text} finished=${!running} />`}
    ${running && !text && html`<p class="waiting"><span class="dots" aria-hidden="true" />Waiting for the first token</p>`}
    <${Figures} message=${message} levels=${levels} />
    ${message.error && html`<${Failure} error=${message.error} onRetry=${last && actions.regenerate} />`}
    ${!running && html`<div class="actions">
      ${text && html`<button class="quiet" onClick=${onCopy}>${copied ? "Copied" : "Copy"}</button>`}
      ${last && !message.error && html`<button class="quiet" onClick=${actions.regenerate}>Regenerate</button>`}
    </div>`}
  </article>`;
}

function History({ all, current, open, onOpen, onChoose, onNew, onDelete, onImport }) {
  const file = useRef(null);
  return html`<aside class=${`history ${open ? "open" : ""}`} aria-label="Conversations">
    <div class="row">
      <button class="grow" onClick=${onNew}>New conversation</button>
      <button class="quiet close" onClick=${() => onOpen(false)} aria-label="Close the list">✕</button>
    </div>
    <ul>${all.map((c) => html`<li key=${c.id} class=${c.id === current ? "on" : ""}>
      <button class="quiet choose" aria-current=${c.id === current ? "true" : undefined}
        onClick=${() => onChoose(c.id)}>${history.title(c)}</button>
      <button class="quiet" aria-label=${`Delete: ${history.title(c)}`} onClick=${() => onDelete(c.id)}>✕</button>
    </li>`)}</ul>
    <p class="hint">Kept in this browser only.</p>
    <div class="row">
      <button class="quiet" disabled=${!all.length} onClick=${() => history.download(all)}>Export</button>
      <button class="quiet" onClick=${() => file.current.click()}>Import</button>
      <input ref=${file} type="file" accept="application/json" hidden onChange=${(event) => {
        if (event.target.files[0]) onImport(event.target.files[0]);
        event.target.value = "";
      }} />
    </div>
  </aside>`;
}

function Composer({ draft, onDraft, running, editing, onSend, onStop, onCancel, onLast, settings, onSettings, status }) {
  const field = useRef(null);
  const [dialog, setDialog] = useState(false);
  useEffect(() => {
    const { current } = field;
    current.style.height = "auto";
    current.style.height = `${Math.min(current.scrollHeight, 240)}px`;
  }, [draft]);
  useEffect(() => {
    if (editing || !running) field.current.focus({ preventScroll: true });
  }, [editing, running]);
  const onKeyDown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) onSend();
    } else if (event.key === "Escape" && editing) onCancel();
    else if (event.key === "ArrowUp" && draft === "" && !running) {
      event.preventDefault();
      onLast();
    }
  };
  return html`<form class="composer" onSubmit=${(event) => {
    event.preventDefault();
    if (!running) onSend();
  }}>
    ${editing && html`<div class="editing">Editing your last message
      <button type="button" class="quiet" onClick=${onCancel}>Cancel</button></div>`}
    <label class="hidden" for="prompt">Message</label>
    <textarea id="prompt" ref=${field} rows="1" value=${draft} placeholder="Ask something"
      onInput=${(event) => onDraft(event.target.value)} onKeyDown=${onKeyDown} />
    <div class="bar">
      <${PrecisionSlider} status=${status} bits=${settings.bits} onChange=${(bits) => onSettings({ bits })} />
      <div class="row">
        <button type="button" class="quiet" aria-haspopup="dialog" onClick=${() => setDialog(true)}>Settings</button>
        ${running
          ? html`<button type="button" class="primary" key="stop" onClick=${onStop}>Stop</button>`
          : html`<button class="primary" key="send" disabled=${!draft.trim() || !status}>Send</button>`}
      </div>
    </div>
    <${SettingsDialog} open=${dialog} onClose=${() => setDialog(false)} settings=${settings} onSettings=${onSettings} />
  </form>`;
}

export function Chat({ status, settings, onSettings }) {
  const [all, setAll] = useState(history.loadConversations);
  const [conversation, setConversation] = useState(history.fresh);
  const [draft, setDraft] = useState("");
  const [editing, setEditing] = useState(false);
  const [running, setRunning] = useState(null); // the AbortController of the answer that comes
  const [open, setOpen] = useState(false);
  const [notice, setNotice] = useState("");
  const [said, setSaid] = useState(""); // for screen readers
  const log = useRef(null);
  const follow = useRef(true);
  const deleted = useRef(new Set());
  const { messages } = conversation;
  const levels = status?.levels ?? [];

  useEffect(() => {
    const { current } = log;
    if (follow.current) current.scrollTop = current.scrollHeight;
  }, [messages]);
  useEffect(() => {
    const stop = (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
    };
    addEventListener("keydown", stop);
    return () => removeEventListener("keydown", stop);
  }, [running]);

  const keep = (changed) => setAll((before) => {
    const after = [changed, ...before.filter((c) => c.id !== changed.id)].filter((c) => c.messages.length);
    setNotice(history.saveConversations(after) ? "" : "The browser's storage is full: this conversation is not kept.");
    return after;
  });

  const ask = async (asked) => {
    const abort = new AbortController();
    const answering = (answer) => ({ ...conversation,
      messages: [...asked, { role: "assistant", ...answer }] });
    // another conversation may be on the screen by then
    const put = (next) => setConversation((shown) => (shown.id === next.id ? next : shown));
    setRunning(abort);
    setEditing(false);
    setSaid("Answering");
    follow.current = true;
    setConversation(answering({ content: "", stats: null }));
    const body = requestBody(status.model, asked, settings, settings.bits);
    const answer = await receive(body, abort.signal, (state) => put(answering(state)));
    const { tokens, ...kept } = answer;
    put(answering(kept));
    if (!deleted.current.has(conversation.id)) keep(answering(kept));
    setRunning((now) => (now === abort ? null : now));
    if (!answer.error) setSaid(`Answer complete: ${answer.stats.tokens} tokens${
      answer.stats.bits == null ? "" : ` at ${named(answer.stats.bits)}`}`);
  };
  const lastUser = messages.findLastIndex((message) => message.role === "user");
  const send = () => {
    const content = draft.trim();
    if (!content || !status) return;
    setDraft("");
    ask([...(editing ? messages.slice(0, lastUser) : messages), { role: "user", content }]);
  };
  const edit = () => {
    if (lastUser < 0) return;
    setDraft(messages[lastUser].content);
    setEditing(true);
  };
  const cancel = () => {
    setDraft("");
    setEditing(false);
  };
  const show = (next) => {
    running?.abort();
    setConversation(next);
    setOpen(false);
    cancel();
    follow.current = true;
  };
  const remove = (id) => {
    deleted.current.add(id);
    const after = all.filter((c) => c.id !== id);
    setAll(after);
    history.saveConversations(after);
    if (id === conversation.id) show(history.fresh());
  };
  const bring = async (file) => {
    try {
      const brought = await history.upload(file);
      const ids = new Set(brought.map((c) => c.id));
      ids.forEach((id) => deleted.current.delete(id));
      const after = [...brought, ...all.filter((c) => !ids.has(c.id))];
      setAll(after);
      setNotice(history.saveConversations(after) ? `${brought.length} conversations imported.`
        : "The browser's storage is full: not everything is kept.");
    } catch (error) {
      setNotice(error.message);
    }
  };
  const actions = { edit, regenerate: () => ask(messages.slice(0, lastUser + 1)) };
  const onScroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = log.current;
    follow.current = scrollHeight - scrollTop - clientHeight < 40;
  };
  return html`<div class="chat">
    <${History} all=${all} current=${conversation.id} open=${open} onOpen=${setOpen} onDelete=${remove}
      onNew=${() => show(history.fresh())} onChoose=${(id) => show(all.find((c) => c.id === id))} onImport=${bring} />
    <section class="talk" aria-label="Conversation">
      <button class="quiet menu" aria-expanded=${open} onClick=${() => setOpen(!open)}>Conversations</button>
      ${notice && html`<p class="notice" role="status">${notice}</p>`}
      <div class="log" ref=${log} onScroll=${onScroll} role="log" aria-live="polite" aria-busy=${Boolean(running)} tabindex="0">
        ${messages.length === 0 && html`<div class="empty">
          <h1>${status?.model ?? "Drop-by-Drop"}</h1>
          <p>One copy of the weights, ${levels.length ? `${levels.length} levels and the averages between them` : "many precisions"}.
            Each answer has the precision that you choose below, or the one that the server can afford.</p>
        </div>`}
        ${messages.map((message, i) => html`<${Message} key=${i} message=${message} levels=${levels}
          running=${Boolean(running) && i === messages.length - 1} actions=${actions}
          last=${message.role === "user" ? i === lastUser : i === messages.length - 1} />`)}
      </div>
      <p class="hidden" role="status">${said}</p>
      <${Composer} draft=${draft} onDraft=${setDraft} running=${Boolean(running)} editing=${editing}
        onSend=${send} onStop=${() => running?.abort()} onCancel=${cancel} onLast=${edit}
        settings=${settings} onSettings=${onSettings} status=${status} />
    </section>
  </div>`;
}
