// A conversation: its turns, and the request that asks for the next answer.

/**
 * One question and its answer.
 * @typedef {{text: string, attachments: import("./attachments.js").Attachment[],
 *            answer: import("./answer.js").Answer | null}} Turn
 */

/** The turns of a conversation, in order. */
export class Conversation {
  constructor() {
    /** @type {Turn[]} */
    this.turns = [];
  }

  /** Pictures and clips of all questions, in the order in which the model sees them. */
  get attachments() {
    return this.turns.flatMap((turn) => turn.attachments);
  }

  /** Return the conversation as it was when a question of it was asked. */
  asAsked(turn) {
    const earlier = new Conversation();
    earlier.turns = [...this.turns.slice(0, this.turns.indexOf(turn)), { ...turn, answer: null }];
    return earlier;
  }

  /**
   * Return the body of the request for the answer to the last question.
   * @param {{model: string, systemPrompt: string, maxTokens: number | null, temperature: number | null,
   *          maxVisualTokens: number | null}} settings
   * @param {(attachment: import("./attachments.js").Attachment) => string} urlOf What stands for an attachment.
   */
  request(settings, urlOf = (attachment) => attachment.dataUrl) {
    const messages = settings.systemPrompt.trim() ? [{ role: "system", content: settings.systemPrompt }] : [];
    for (const turn of this.turns) {
      messages.push({ role: "user", content: contentOf(turn, urlOf) });
      if (turn.answer) messages.push(messageOf(turn.answer));
    }
    const body = { model: settings.model, messages, stream: true, stream_options: { include_usage: true } };
    if (settings.maxTokens !== null) body.max_completion_tokens = settings.maxTokens;
    if (settings.temperature !== null) body.temperature = settings.temperature;
    if (settings.maxVisualTokens !== null) body.max_visual_tokens = settings.maxVisualTokens;
    return { ...body, timings: true, boxes: true };
  }
}

function contentOf(turn, urlOf) {
  if (!turn.attachments.length) return turn.text;
  return [...turn.attachments.map((each) => each.toPart(urlOf(each))), { type: "text", text: turn.text }];
}

function messageOf(answer) {
  const message = { role: "assistant", content: answer.text };
  if (answer.reasoning) message.reasoning_content = answer.reasoning;
  return message;
}
