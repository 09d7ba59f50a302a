"use strict";

// What both pages share.

const $ = (id) => document.getElementById(id);

/** What the server answers to a question. Throws an Error whose message is one line for people. */
async function ask(path, body) {
  const request = body && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new Error("the page's server does not answer; start it again, then try once more");
  }
  const found = await response.json().catch(() => ({ error: `the server failed (${response.status}); its log says why` }));
  if (!response.ok) throw new Error(found.error || found.detail || `the server answered ${response.status}`);
  return found;
}

function showError(element, text) {
  element.textContent = text;
  element.hidden = !text;
}
