// A request as code to be run elsewhere. Files are read where it runs: their contents are not in it, and no API key is.

const START = "\u0000file "; // no text of a request holds this
const MARK = /\u0000file (\d+)\u0000/;

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {{url: string, hasKey: boolean}} Place Address of the server's API, and whether it wants a key.
 */

/**
 * Return a command for a POSIX shell.
 * @param {Conversation} conversation
 * @param {object} settings
 * @param {Place} place
 */
export function asCurl(conversation, settings, place) {
  const { body, files } = withMarks(conversation, settings);
  // In such a here-document the shell replaces $( ) and backslashes; the text is kept from it, the files are not.
  const text = JSON.stringify(body, null, 2).replace(/[\\$`]/g, "\\$&");
  const filled = text.replace(new RegExp(JSON_MARK, "g"), (_, index) => {
    const { name, head } = files[index];
    return `${head}$(base64 < ${quoted(name)} | tr -d '\\n')`;
  });
  const key = place.hasKey ? " -H \"Authorization: Bearer $API_KEY\"" : "";
  return `curl -N ${quoted(`${place.url}/chat/completions`)}${key} -H 'Content-Type: application/json' --data-binary @- <<${END}\n${filled}\n${END}\n`;
}

const END = "END_OF_REQUEST";
const JSON_MARK = "\\\\\\\\u0000file (\\d+)\\\\\\\\u0000"; // as JSON writes it, with the shell's backslashes

/**
 * Return a program in Python that uses the package `openai`.
 * @param {Conversation} conversation
 * @param {object} settings
 * @param {Place} place
 */
export function asPython(conversation, settings, place) {
  const { body, files } = withMarks(conversation, settings);
  const { timings, boxes, max_visual_tokens: visual, stream, stream_options: streamOptions, ...known } = body;
  const extra = visual === undefined ? { boxes } : { max_visual_tokens: visual, boxes };
  const imports = [
    ...(files.length ? ["import base64"] : []),
    ...(place.hasKey ? ["import os"] : []),
    ...(files.length ? ["from pathlib import Path"] : []),
  ];
  const lines = [
    ...(imports.length ? [...imports, ""] : []),
    "from openai import OpenAI",
    "",
    ...(files.length ? DATA_URL : []),
    `client = OpenAI(base_url=${literal(place.url)}, api_key=${place.hasKey ? 'os.environ["API_KEY"]' : '"none"'})`,
    "answer = client.chat.completions.create(",
    ...Object.entries(known).map(([name, value]) => `    ${name}=${python(value, files, 1)},`),
    `    extra_body=${python(extra, files, 1)},`,
    ")",
    "print(answer.choices[0].message.content)",
    "",
  ];
  return lines.join("\n");
}

const DATA_URL = [
  "",
  "def data_url(path, kind):",
  '    return f"data:{kind};base64," + base64.b64encode(Path(path).read_bytes()).decode()',
  "",
  "",
];

function withMarks(conversation, settings) {
  const files = [];
  const body = conversation.request(settings, (attachment) => {
    const head = attachment.dataUrl.slice(0, attachment.dataUrl.indexOf(",") + 1);
    files.push({ name: attachment.name, head, kind: head.slice("data:".length, head.indexOf(";")) });
    return `${START}${files.length - 1}\u0000`;
  });
  return { body, files };
}

function quoted(text) {
  // A name that begins with a dash or holds anything else stays one word.
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function python(value, files, depth) {
  const indent = "    ".repeat(depth + 1);
  const close = "    ".repeat(depth);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "number") return String(value);
  if (typeof value === "string") {
    const mark = MARK.exec(value);
    return mark ? `data_url(${literal(files[mark[1]].name)}, ${literal(files[mark[1]].kind)})` : literal(value);
  }
  if (Array.isArray(value)) {
    return `[\n${value.map((each) => `${indent}${python(each, files, depth + 1)},\n`).join("")}${close}]`;
  }
  const entries = Object.entries(value).map(([name, each]) => `${literal(name)}: ${python(each, files, depth + 1)}`);
  return `{${entries.join(", ")}}`;
}

/** Return a string of Python: JSON's is one, since JSON.stringify writes half of a character pair as an escape. */
function literal(text) {
  return JSON.stringify(text);
}
