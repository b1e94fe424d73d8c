"use strict";
// The chat page. Answers come as text and are shown as text until the server has rendered them to safe HTML (/render);
// conversations stay in this browser, the key only in this tab.

const WORDS = {
  en: {
    skip: "Skip to the message", newChat: "New chat", chats: "Chats", language: "Language", model: "Model", settings: "Settings",
    system: "System message", temperature: "Temperature", topP: "Top-p", maxTokens: "Longest answer, tokens", seed: "Seed",
    key: "API key", empty: "What is left empty is the server's own.", message: "Message", placeholder: "Write a message",
    send: "Send", stop: "Stop", edit: "Edit", again: "Try again", copy: "Copy", copied: "Copied", save: "Send again",
    cancel: "Cancel", remove: "Delete", close: "Close", untitled: "New chat", hello: "Ask something.",
    timing: (n, rate, first) => `${n} tokens · ${rate} tokens/s · first after ${first} s`, cut: "cut at the longest length",
    stopped: "stopped", lost: "The server cannot be reached.", needsKey: "This server wants an API key: see Settings.",
    you: "You", answer: "Answer",
  },
  zh: {
    skip: "跳到输入框", newChat: "新对话", chats: "对话", language: "语言", model: "模型", settings: "设置",
    system: "系统消息", temperature: "温度", topP: "Top-p", maxTokens: "最长回答（词元）", seed: "随机种子",
    key: "API 密钥", empty: "留空则用服务器的默认值。", message: "消息", placeholder: "写点什么",
    send: "发送", stop: "停止", edit: "编辑", again: "重新生成", copy: "复制", copied: "已复制", save: "重新发送",
    cancel: "取消", remove: "删除", close: "关闭", untitled: "新对话", hello: "问点什么吧。",
    timing: (n, rate, first) => `${n} 个词元 · 每秒 ${rate} 个 · 首个用时 ${first} 秒`, cut: "已达最长长度",
    stopped: "已停止", lost: "无法连接服务器。", needsKey: "此服务器需要 API 密钥：见“设置”。",
    you: "你", answer: "回答",
  },
};
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const $ = (id) => document.getElementById(id);
const kept = read("llama2.page", { chats: [], current: null, settings: {}, language: null, model: null });
let running = null; // the AbortController of the answer that is being written
let language = kept.language || (navigator.language.startsWith("zh") ? "zh" : "en");

function read(name, otherwise) {
  try { return { ...otherwise, ...JSON.parse(localStorage.getItem(name) || "{}") }; } catch { return otherwise; }
}
const say = (word) => WORDS[language][word];
const chat = () => kept.chats.find((each) => each.id === kept.current);

function element(tag, { text, classes = "", label, ...rest } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  made.className = classes;
  if (label) { made.setAttribute("aria-label", label); made.title = label; }
  for (const [name, value] of Object.entries(rest)) made[name] = value;
  made.append(...children);
  return made;
}
const button = (word, onclick, classes = "") => element("button", { text: say(word), type: "button", classes, onclick });

// ---- what is shown

function speak() { // all fixed words, in the chosen language
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  for (const each of document.querySelectorAll("[data-label]")) {
    each.setAttribute("aria-label", say(each.dataset.label));
    each.title = say(each.dataset.label);
  }
  for (const each of document.querySelectorAll("[data-placeholder]")) each.placeholder = say(each.dataset.placeholder);
  $("language").value = language;
}

function showChats() {
  $("chats").replaceChildren(...kept.chats.map((each) => {
    const open = element("button", { text: each.title || say("untitled"), classes: "open", type: "button", onclick: () => enter(each.id) });
    if (each.id === kept.current) open.setAttribute("aria-current", "true");
    const drop = element("button", { text: "✕", classes: "drop", type: "button", onclick: () => remove(each.id), label: `${say("remove")}: ${each.title || say("untitled")}` });
    return element("li", { classes: each.id === kept.current ? "current" : "" }, open, drop);
  }));
}

function showMessages() {
  const messages = chat()?.messages || [];
  const shown = messages.map((message, index) => article(message, index, index === messages.length - 1));
  $("log").replaceChildren(...(shown.length ? shown : [element("p", { text: say("hello"), classes: "hello" })]));
  $("log").scrollTop = $("log").scrollHeight;
  render(messages.filter((each) => each.role === "assistant" && each.content && !each.html));
}

function article(message, index, isLast) {
  const text = element("div", { classes: "text" }), tools = element("div", { classes: "tools" });
  const made = element("section", { classes: `message ${message.role}` }, text, tools);
  made.setAttribute("aria-label", say(message.role === "user" ? "you" : "answer"));
  message.place = () => made; // for the answer that is being written
  fill(text, message);
  if (message.problem) made.insertBefore(element("p", { text: message.problem, classes: "problem", role: "alert" }), tools);
  if (running && isLast) return made;
  if (message.role === "user") tools.append(button("edit", () => edit(made, index)));
  if (message.role === "assistant") {
    if (message.timing) tools.append(element("span", { text: note(message.timing) }));
    if (message.content) tools.append(button("copy", (event) => copy(event.target, message.content)));
    if (isLast) tools.append(button("again", () => again(index)));
  }
  return made;
}

function fill(text, message) {
  if (message.html) { // made by /render: no tag or address in it comes from the model
    text.className = "text md";
    text.innerHTML = message.html;
  } else {
    text.className = `text raw${message.content || message.problem ? "" : " waiting"}`;
    text.textContent = message.content;
  }
}

function note({ n, seconds, first, end }) {
  const rate = n > 1 && seconds > first ? ((n - 1) / (seconds - first)).toFixed(1) : "–";
  const more = { length: ` · ${say("cut")}`, stopped: ` · ${say("stopped")}` }[end] || "";
  return say("timing")(n, rate, (first ?? seconds).toFixed(2)) + more;
}

async function copy(where, text) {
  try { await navigator.clipboard.writeText(text); where.textContent = say("copied"); } catch { /* not allowed here */ }
}

function edit(place, index) {
  if (running) return;
  const area = element("textarea", { value: chat().messages[index].content, rows: 3, label: say("edit") });
  const save = () => { if (area.value.trim()) { chat().messages.length = index; send(area.value); } };
  area.onkeydown = (event) => {
    if (event.key === "Escape") showMessages();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); save(); }
  };
  place.replaceChildren(element("div", { classes: "edit" }, area, element("div", { classes: "tools" }, button("save", save), button("cancel", showMessages))));
  area.focus();
}

function again(index) {
  if (running) return;
  chat().messages.length = index;
  answer();
}

// ---- what the server is asked

function headers() {
  const key = sessionStorage.getItem("llama2.key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers: headers(), body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(say("lost"));
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Error(response.status === 401 ? say("needsKey") : said?.error?.message || `${response.status} ${response.statusText}`);
}

async function render(messages) {
  if (!messages.length) return;
  const texts = messages.map((each) => each.content);
  try {
    const { html } = await (await ask("render", { texts })).json();
    messages.forEach((message, i) => {
      if (message.content !== texts[i]) return; // it has grown since
      message.html = html[i];
      const text = message.place?.().querySelector(".text");
      if (text) fill(text, message);
    });
  } catch { /* then it stays text */ }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      yield JSON.parse(line.slice(6));
    }
  }
}

function request(messages) {
  const system = $("system").value.trim();
  const asked = {
    model: $("model").value, stream: true, stream_options: { include_usage: true },
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.map(({ role, content }) => ({ role, content }))],
  };
  for (const name of SAMPLING) if ($(name).value !== "") asked[name] = Number($(name).value);
  return asked;
}

async function answer() {
  const here = chat(), asked = request(here.messages), message = { role: "assistant", content: "" };
  const timing = { n: 0, seconds: 0, first: null, end: "" }, began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  here.messages.push(message);
  const mine = running = new AbortController();
  busy(true);
  showMessages();
  let painted = 0;
  try {
    for await (const event of events(await ask("v1/chat/completions", asked, mine.signal))) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (event.usage) timing.n = event.usage.completion_tokens;
      if (!choice) continue;
      if (choice.finish_reason) timing.end = choice.finish_reason;
      if (!choice.delta.content) continue;
      timing.first ??= passed();
      timing.n += 1;
      message.content += choice.delta.content;
      if (kept.current === here.id && performance.now() - painted > 40) { painted = performance.now(); paint(message); }
    }
  } catch (error) {
    if (mine.signal.aborted) timing.end = "stopped"; else message.problem = error.message;
  }
  timing.seconds = passed();
  if (timing.n) message.timing = timing;
  running = null;
  busy(false);
  if (kept.current === here.id) showMessages();
  tidy();
  $("prompt").focus();
}

function paint(message) { // the answer so far; who has scrolled up is left there
  const log = $("log"), follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const text = message.place?.().querySelector(".text");
  if (text) fill(text, message);
  if (follows) log.scrollTop = log.scrollHeight;
}

function tidy() { // what is kept: texts and settings, no HTML
  for (const each of kept.chats) for (const message of each.messages) if (!document.contains(message.place?.())) delete message.html;
  const plain = { ...kept, chats: kept.chats.map((each) => ({ ...each, messages: each.messages.map(({ html, place, ...rest }) => rest) })) };
  try { localStorage.setItem("llama2.page", JSON.stringify(plain)); } catch { /* a full or forbidden store: the page goes on */ }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

// ---- what people do

function begin() {
  const empty = kept.chats.find((each) => !each.messages.length);
  const made = empty || { id: crypto.randomUUID?.() || String(Date.now() + Math.random()), title: "", messages: [] };
  if (!empty) kept.chats.unshift(made);
  enter(made.id);
}

function enter(id) {
  if (running) running.abort();
  kept.current = id;
  drawer(false);
  showChats();
  showMessages();
  tidy();
  $("prompt").focus();
}

function remove(id) {
  if (running && kept.current === id) running.abort();
  kept.chats = kept.chats.filter((each) => each.id !== id);
  if (kept.current === id) { kept.current = kept.chats[0]?.id ?? null; if (!kept.current) return begin(); }
  showChats();
  showMessages();
  tidy();
}

function send(text) {
  const here = chat();
  here.title ||= text.trim().slice(0, 60);
  here.messages.push({ role: "user", content: text });
  showChats();
  answer();
}

function drawer(is) {
  $("side").classList.toggle("open", is);
  $("open-side").setAttribute("aria-expanded", String(is));
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  $("prompt").value = "";
  grow();
  send(text);
};
$("prompt").oninput = grow;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); }
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  drawer(false);
});
$("stop").onclick = () => running?.abort();
$("new").onclick = begin;
$("open-side").onclick = () => drawer(!$("side").classList.contains("open"));
$("close-side").onclick = () => drawer(false);
$("open-settings").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("open-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
};
$("settings").onsubmit = (event) => event.preventDefault();
for (const name of [...SAMPLING, "system"]) {
  $(name).value = kept.settings[name] ?? "";
  $(name).onchange = () => { kept.settings[name] = $(name).value; tidy(); };
}
$("key").value = sessionStorage.getItem("llama2.key") || "";
$("key").onchange = () => { sessionStorage.setItem("llama2.key", $("key").value); listModels(); };
$("language").onchange = () => { kept.language = language = $("language").value; speak(); showChats(); showMessages(); tidy(); };
$("model").onchange = () => { kept.model = $("model").value; tidy(); };

async function listModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => element("option", { text: id, value: id })));
    if (data.some(({ id }) => id === kept.model)) $("model").value = kept.model;
  } catch (error) {
    $("log").prepend(element("p", { text: error.message, classes: "problem", role: "alert" }));
    if (error.message === say("needsKey")) { $("settings").hidden = false; $("key").focus(); }
  }
}

for (const each of kept.chats) { // a page that was closed while it was answering
  const last = each.messages.at(-1);
  if (last?.role === "assistant" && !last.content && !last.problem) each.messages.pop();
}
speak();
if (chat()) { showChats(); showMessages(); } else begin();
listModels();
