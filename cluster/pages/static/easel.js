"use strict";

// The picture to start from and the mask painted over it: the centred square, as the models see it.

const LARGEST_SIDE = 1024;  // of what is sent; the models draw at most 256 px
const PAINT = "#2f5bd0";

const easel = { side: 0, painted: false, last: null };

/** Show the centred square of a picture; null takes it away. */
function place(image) {
  easel.side = image ? Math.min(image.naturalWidth, image.naturalHeight, LARGEST_SIDE) : 0;
  for (const canvas of [$("picture"), $("mask")]) canvas.width = canvas.height = easel.side || 1;
  easel.painted = false;
  if (!image) return;
  const from = Math.min(image.naturalWidth, image.naturalHeight);
  const pen = $("picture").getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, (image.naturalWidth - from) / 2, (image.naturalHeight - from) / 2, from, from, 0, 0, easel.side, easel.side);
}

function clearMask() {
  $("mask").getContext("2d").clearRect(0, 0, easel.side, easel.side);
  easel.painted = false;
}

function at(event) {
  const box = $("mask").getBoundingClientRect();
  return [((event.clientX - box.left) * easel.side) / box.width, ((event.clientY - box.top) * easel.side) / box.height];
}

function stroke(event) {
  const pen = $("mask").getContext("2d");
  const here = at(event);
  pen.strokeStyle = PAINT;
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = (Number($("brush").value) / 100) * easel.side;
  pen.beginPath();
  pen.moveTo(...(easel.last || here));
  pen.lineTo(...here);
  pen.stroke();
  easel.last = here;
  easel.painted = true;
}

$("mask").addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.target.setPointerCapture(event.pointerId);
  easel.last = null;
  showError($("error"), "");
  stroke(event);
});
$("mask").addEventListener("pointermove", (event) => {
  if (event.buttons & 1) for (const part of event.getCoalescedEvents?.() || [event]) stroke(part);
});
$("clear").addEventListener("click", clearMask);

const base64 = (canvas) => canvas.toDataURL("image/png").split(",")[1];

/** The mask as a picture: white where it was painted, black elsewhere. */
function maskPicture() {
  const sheet = Object.assign(document.createElement("canvas"), { width: easel.side, height: easel.side });
  const pen = sheet.getContext("2d");
  pen.drawImage($("mask"), 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, easel.side, easel.side);
  pen.globalCompositeOperation = "destination-over";
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, easel.side, easel.side);
  return base64(sheet);
}
