// One turn on the page: the question with its pictures, and the answer as it grows.

import { button, element } from "./dom.js";
import { figureOf, shown } from "./media.js";

/** The elements of one turn. */
export class TurnView {
  /**
   * @param {import("./conversation.js").Turn} turn
   * @param {number} number Of the turn, from 1 on.
   */
  constructor(turn, number) {
    const pictures = turn.attachments.map((each) =>
      element("li", {}, shown(each, { hasControls: true }), element("span", { class: "name" }, each.name)),
    );
    this.#text = document.createTextNode("");
    this.#thoughts = document.createTextNode("");
    this.#thoughtsName = element("summary", {}, "Thinking …");
    this.#thoughtsBox = element(
      "details",
      { class: "thoughts", hidden: true },
      this.#thoughtsName,
      element("div", { class: "text" }, this.#thoughts),
    );
    this.#answer = element(
      "div",
      { class: "answer", "aria-busy": "true" },
      element("h3", {}, `Answer ${number}`),
      this.#thoughtsBox,
      element("div", { class: "text growing" }, this.#text),
    );
    this.element = element(
      "article",
      { class: "turn", "aria-label": `Turn ${number}` },
      element(
        "div",
        { class: "asked" },
        element("h3", {}, `Question ${number}`),
        ...(pictures.length ? [element("ul", { class: "pictures", "aria-label": "Its pictures and clips" }, ...pictures)] : []),
        element("div", { class: "text" }, turn.text),
      ),
      this.#answer,
    );
  }

  #text;
  #thoughts;
  #thoughtsName;
  #thoughtsBox;
  #answer;

  /** Add what is new of the answer, as text. */
  append({ text, reasoning }) {
    if (reasoning) {
      this.#thoughtsBox.hidden = false;
      this.#thoughts.appendData(reasoning);
    }
    if (text) {
      this.#thoughtsName.textContent = "Thoughts";
      this.#text.appendData(text);
    }
  }

  /**
   * Show what there is of an answer that has ended.
   * @param {import("./answer.js").Answer} answer
   * @param {import("./attachments.js").Attachment[]} attachments Those of all questions so far.
   * @param {Record<string, () => string>} copies What can be copied, by what the button says.
   * @param {(text: string, what: string) => void} copy
   */
  finish(answer, attachments, copies, copy) {
    this.#answer.setAttribute("aria-busy", "false");
    this.#answer.querySelector(".growing").classList.remove("growing");
    this.#thoughtsName.textContent = "Thoughts";
    if (!answer.text) this.#answer.append(element("p", { class: "quiet" }, "The answer has no text."));
    this.#answer.append(...figures(answer, attachments));
    const list = element("dl", { class: "figures", "aria-label": "Figures of this answer" });
    for (const [name, value] of answer.figures()) {
      list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    }
    const buttons = Object.entries(copies).map(([label, textOf]) => button(label, () => copy(textOf(), label)));
    this.#answer.append(list, element("div", { class: "row tools" }, ...buttons));
  }

  /** Say in the turn that its answer broke off. */
  fail(message) {
    this.#answer.append(element("p", { class: "failure" }, message));
  }
}

/** Return a figure for each picture on which something was found. */
function figures(answer, attachments) {
  return attachments.flatMap((attachment, index) => {
    const isHere = (place) => place.image === index;
    const boxes = answer.boxes.filter(isHere);
    const points = answer.points.filter(isHere);
    return boxes.length + points.length ? [figureOf(attachment, boxes, points)] : [];
  });
}
