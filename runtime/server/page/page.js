// The page: asks what is in the form, and shows the conversation.

import { Answer } from "./answer.js";
import { askForChunks, listModels } from "./api.js";
import { Conversation } from "./conversation.js";
import { button, byId, element } from "./dom.js";
import { asCurl, asPython } from "./request_code.js";
import { Tray } from "./tray.js";
import { TurnView } from "./turn_view.js";

const KEY = "qwen3vl-api-key"; // name in the storage of this tab

const question = byId("question");
const voice = { say, warn };
const tray = new Tray(voice);
let conversation = new Conversation();
let models = [];
let loading = Promise.resolve(); // ends when the models are known, or an error is shown
let apiKey = storedKey();
let running = null; // the AbortController of the request in progress
let isSubmitting = false; // models are asked for, or files of the question are still being read
let afterKey = null; // what to do when there is a key

/** Let a screen reader say something, once. */
function say(text) {
  byId("spoken").replaceChildren(element("p", {}, text)); // a new element is read, even if it says the same
}

/** Show what went wrong, and let a screen reader say it at once. */
function warn(text, ...actions) {
  byId("alerts").replaceChildren(element("p", { class: "failure" }, text, ...actions));
}

function clearWarnings() {
  byId("alerts").replaceChildren();
}

// The API key. A browser may refuse storage to all pages; then the key lasts until the page is left.

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function useKey(event) {
  event.preventDefault();
  apiKey = byId("key").value.trim();
  try {
    sessionStorage.setItem(KEY, apiKey);
  } catch {
    // It is in `apiKey`.
  }
  byId("key").value = "";
  byId("key-form").hidden = true;
  clearWarnings();
  question.focus();
  loadModels(afterKey);
}

// Models

/** Fill the list of models, and then do what waits for it. */
function loadModels(then = null) {
  loading = showModels(then);
}

async function showModels(then) {
  try {
    models = await listModels(apiKey);
  } catch (error) {
    report(error, then, () => loadModels(then));
    return;
  }
  const select = byId("model");
  const chosen = select.value;
  select.replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  if (models.some(({ id }) => id === chosen)) select.value = chosen;
  select.disabled = models.length < 2;
  showModelFacts();
  then?.();
}

function showModelFacts() {
  const model = models.find(({ id }) => id === byId("model").value);
  const context = model?.max_model_len ? `context of ${model.max_model_len.toLocaleString("en")} tokens` : "";
  byId("model-facts").textContent = [model?.target, context].filter(Boolean).join(", ");
}

// Errors

/**
 * Show an error; where a key is missing, ask for one.
 * @param {Error} error
 * @param {(() => void) | null} afterwards What to do when there is a key and the models are known.
 * @param {() => void} again What failed.
 */
function report(error, afterwards, again) {
  if (error.status === 401) {
    afterKey = afterwards;
    byId("key-form").hidden = false;
    byId("key").focus();
    // The server's own words speak of headers.
    warn(apiKey ? "The server does not take this API key. Compare it, and enter it again." : "The server wants an API key.");
    return;
  }
  const retry = button("Try again", () => {
    clearWarnings();
    again();
  });
  warn(error.message, " ", retry);
}

// Asking

function settings() {
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  return {
    model: byId("model").value,
    systemPrompt: byId("system-prompt").value,
    maxTokens: number("max-tokens"),
    temperature: number("temperature"),
    maxVisualTokens: number("max-visual-tokens"),
  };
}

async function submit() {
  if (running || isSubmitting) {
    say("Wait for the answer, or stop it");
    return;
  }
  clearWarnings();
  if (!isComplete()) return;
  isSubmitting = true;
  await loading;
  if (!models.length) {
    isSubmitting = false;
    loadModels(submit); // what went wrong may be over
    return;
  }
  const text = question.value.trim();
  question.value = "";
  const attachments = await tray.take();
  isSubmitting = false;
  ask({ text, attachments, answer: null });
}

/** Return whether there is something to ask; says what is missing. */
function isComplete() {
  const form = byId("ask-form");
  if (!form.checkValidity()) {
    byId("settings").open = true; // what is wrong can be in there, and has to be seen
    form.reportValidity();
    return false;
  }
  if (!question.value.trim()) {
    warn("There is no question yet. Write one, then ask.");
    question.focus();
    return false;
  }
  return true;
}

/** Ask a question, and show its answer as it comes. */
async function ask(turn) {
  const view = new TurnView(turn, conversation.turns.length + 1);
  const here = conversation;
  const used = settings();
  here.turns.push(turn);
  byId("turns").append(view.element);
  view.element.scrollIntoView({ block: "end" });
  const answer = new Answer();
  const controller = new AbortController();
  setRunning(controller);
  say("Asking");
  let problem = null;
  try {
    for await (const chunk of askForChunks(here.request(used), apiKey, controller.signal)) {
      const isAtEnd = isScrolledDown();
      view.append(answer.push(chunk));
      if (isAtEnd) scrollDown();
    }
  } catch (error) {
    problem = error;
  }
  if (here !== conversation) return; // a new one has begun
  setRunning(null);
  conclude({ turn, view, answer, used, problem });
}

/** Show how an answer ended. A question without any answer goes back to where it was written. */
function conclude({ turn, view, answer, used, problem }) {
  const isStopped = problem?.name === "AbortError";
  if (problem && !answer.text && !answer.reasoning) {
    conversation.turns.pop();
    view.element.remove();
    giveBack(turn);
    if (isStopped) {
      say("Stopped. The question is in the field again");
    } else {
      report(problem, submit, submit);
    }
    return;
  }
  if (problem) answer.finishReason = isStopped ? "stopped" : "failed";
  turn.answer = answer;
  const isAtEnd = isScrolledDown();
  const asked = conversation.asAsked(turn);
  const place = { url: new URL("v1", document.baseURI).href, hasKey: apiKey !== "" };
  const copies = {
    "Copy answer": () => answer.text,
    "Copy as curl": () => asCurl(asked, used, place),
    "Copy as Python": () => asPython(asked, used, place),
  };
  view.finish(answer, asked.attachments, copies, copy);
  if (isAtEnd) scrollDown();
  if (problem && !isStopped) {
    view.fail(problem.message);
    warn(problem.message);
  } else {
    say(`${isStopped ? "Stopped" : "Answer"}: ${answer.text}`);
  }
}

function giveBack(turn) {
  question.value = [turn.text, question.value].filter(Boolean).join("\n"); // the next one may have been begun
  tray.putBack(turn.attachments);
}

function setRunning(controller) {
  running = controller;
  const [ask, stop] = [byId("ask"), byId("stop")];
  const [gone, here] = controller ? [ask, stop] : [stop, ask];
  const hadFocus = document.activeElement === gone;
  gone.hidden = true;
  here.hidden = false;
  if (hadFocus) here.focus();
}

function stopAnswer() {
  running?.abort();
}

function beginAgain() {
  stopAnswer();
  setRunning(null);
  for (const attachment of conversation.attachments) attachment.release();
  conversation = new Conversation();
  byId("turns").replaceChildren();
  clearWarnings();
  say("A new conversation has begun");
  question.focus();
}

// Copying and scrolling

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that did not come by https, from another machine, have no clipboard but this.
    const field = element("textarea", { class: "only-spoken", "aria-label": "Text to copy" });
    const focused = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    focused?.focus();
    if (!isDone) {
      warn("The browser does not let this page copy. Select the text and copy it by hand.");
      return;
    }
  }
  say(`Copied: ${what.replace("Copy ", "")}`);
}

function isScrolledDown() {
  const { scrollHeight, scrollTop, clientHeight } = document.documentElement;
  return scrollHeight - scrollTop - clientHeight < 40;
}

function scrollDown() {
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
}

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
}

question.addEventListener("keydown", onKey);
document.addEventListener("keydown", (event) => event.key === "Escape" && stopAnswer());
byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("ask-form").noValidate = true; // checked in `isComplete`, which opens the settings first
byId("key-form").addEventListener("submit", useKey);
byId("stop").addEventListener("click", stopAnswer);
byId("new-conversation").addEventListener("click", beginAgain);
byId("model").addEventListener("change", showModelFacts);
loadModels();
