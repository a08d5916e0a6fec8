// The page: three views (chat, compare, load) over one state of the server, which is asked for
// every second while the page is visible.

import { ApiError, getJson, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { loadSettings, saveSettings } from "./history.js";
import { Load, Meter } from "./load.js";
import { html, render, useCallback, useEffect, useRef, useState } from "./vendor/htm-preact.js";

const VIEWS = { chat: "Chat", compare: "Compare", load: "Load" };
const KEPT = 120; // seconds of samples for the curves

/** The server's /status.json, the last two minutes of it, and why there is none. */
function useStatus(attempt) {
  const [state, setState] = useState({ status: null, samples: [], error: null });
  useEffect(() => {
    let timer;
    let ended = false;
    const ask = async () => {
      if (!document.hidden) {
        try {
          const status = await getJson("/status.json");
          const at = Date.now();
          if (!ended) setState(({ samples }) => ({ status, error: null,
            samples: [...samples, { at, ...status }].filter((s) => at - s.at < KEPT * 1000) }));
        } catch (error) {
          if (!ended) setState((before) => ({ ...before, error }));
          if (error.status === 401) return; // until there is another key
        }
      }
      if (!ended) timer = setTimeout(ask, 1000);
    };
    ask();
    return () => {
      ended = true;
      clearTimeout(timer);
    };
  }, [attempt]);
  return state;
}

function useView() {
  const read = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat");
  const [view, setView] = useState(read);
  useEffect(() => {
    const changed = () => setView(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return view;
}

function KeyDialog({ open, refused, onKey }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open && dialog.current.open) dialog.current.close();
  }, [open]);
  const submit = (event) => {
    event.preventDefault();
    onKey(new FormData(event.target).get("key"));
  };
  return html`<dialog ref=${dialog} class="dialog" aria-labelledby="key-title">
    <form onSubmit=${submit}>
      <h2 id="key-title">API key</h2>
      <p>${refused ? "The server refused this key." : "This server asks for a key. It is kept for this tab only."}</p>
      <label class="field">Key
        <input name="key" type="password" autocomplete="off" required autofocus />
      </label>
      <div class="row end"><button class="primary">Use this key</button></div>
    </form>
  </dialog>`;
}

function App() {
  const [attempt, setAttempt] = useState(0);
  const { status, samples, error } = useStatus(attempt);
  const [settings, setSettings] = useState(loadSettings);
  const view = useView();
  const locked = error instanceof ApiError && error.status === 401;
  const change = useCallback((changes) => setSettings((before) => {
    const after = { ...before, ...changes };
    saveSettings(after);
    return after;
  }), []);
  const useKey = (key) => {
    setKey(key);
    setAttempt((n) => n + 1);
  };
  useEffect(() => {
    document.title = status ? `${status.model} – Drop-by-Drop` : "Drop-by-Drop";
  }, [status?.model]);
  const shared = { status, settings, onSettings: change };
  return html`
    <a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("main").focus();
    }}>Skip to the content</a>
    <header class="top">
      <span class="brand"><img src="/page/icon.svg" alt="" width="20" height="20" />
        <span class="model" title=${status?.model}>${status?.model ?? "Drop-by-Drop"}</span></span>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(([name, label]) => html`<a key=${name} href=${`#${name}`}
          aria-current=${view === name ? "page" : undefined}>${label}</a>`)}
      </nav>
      <${Meter} status=${status} error=${error} />
    </header>
    <main id="main" tabindex="-1" class=${`view-${view}`}>
      <div hidden=${view !== "chat"} class="view"><${Chat} ...${shared} /></div>
      <div hidden=${view !== "compare"} class="view"><${Compare} ...${shared} /></div>
      ${view === "load" && html`<div class="view"><${Load} status=${status} samples=${samples} error=${error} /></div>`}
    </main>
    <${KeyDialog} open=${locked} refused=${locked && attempt > 0} onKey=${useKey} />`;
}

render(html`<${App} />`, document.getElementById("app"));
