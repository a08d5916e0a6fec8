// Markdown of a model, shown. Nothing that a model writes is trusted: HTML in it is shown as text,
// and what marked makes of the rest passes DOMPurify with a short list of tags and attributes.

import { html, useEffect, useMemo, useRef } from "./vendor/htm-preact.js";
import { Marked } from "./vendor/marked.js";
import "./vendor/purify.js";

const purifier = globalThis.DOMPurify;
const escape = (text) =>
  text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    // An image would be a request to another machine; its address is shown instead.
    image: ({ text, href }) => `${escape(text)} (${escape(href)})`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td",
  ],
  ALLOWED_ATTR: ["href", "align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Safe HTML of a text. */
export const render = (text) => purifier.sanitize(marked.parse(text), ALLOWED);

export function Markdown({ text, finished = true }) {
  const element = useRef(null);
  const __html = useMemo(() => render(text), [text]);
  useEffect(() => {
    if (finished) element.current.querySelectorAll("pre").forEach(addCopy);
  }, [__html, finished]);
  return html`<div class="prose" ref=${element} dangerouslySetInnerHTML=${{ __html }} />`;
}

function addCopy(pre) {
  if (pre.querySelector("button")) return;
  pre.tabIndex = 0; // it scrolls, so the keyboard must reach it
  const code = pre.textContent;
  const button = document.createElement("button");
  button.className = "quiet copy";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy code");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(code)) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  pre.append(button);
}

/** Put a text on the clipboard; false where the browser forbids it. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
