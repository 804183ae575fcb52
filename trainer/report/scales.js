"use strict";
// Numbers to pixels and to text: domains, ticks that are round, and formats. Draws nothing.

/** A round step that cuts a span into about this many parts. */
function roundStep(span, count) {
  const raw = span / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const leading = raw / power;
  return (leading < 1.5 ? 1 : leading < 3.5 ? 2 : leading < 7.5 ? 5 : 10) * power;
}

/** A linear scale; with `widen` its ends are round numbers. */
function linearScale(low, high, pixels, { count, widen = true, whole = false }) {
  if (!(high > low)) {
    const room = low === 0 ? 1 : Math.abs(low) * 0.1;
    [low, high] = low === 0 ? [0, 1] : [low - room, high + room];
  }
  let step = roundStep(high - low, count);
  if (whole) step = Math.max(Math.round(step), 1);
  if (widen) [low, high] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  const [from, to] = pixels;
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  return { at, ticks, low, high, back: (pixel) => low + ((pixel - from) / (to - from)) * (high - low) };
}

/** A logarithmic scale over positive numbers; ticks at 1, 2 and 5 of a decade where there is room. */
function logScale(low, high, pixels, { count }) {
  if (!(high > low)) [low, high] = [low / 2, high * 2];
  const [from, to] = pixels;
  const [a, b] = [Math.log10(low), Math.log10(high)];
  const room = (b - a) * 0.04;
  const [start, end] = [a - room, b + room];
  const at = (value) => from + ((Math.log10(value) - start) / (end - start)) * (to - from);
  const decades = Math.ceil(end) - Math.floor(start);
  const every = Math.max(1, Math.ceil(decades / count));
  const leading = decades > count / 2 + 1 ? [1] : decades > 2 ? [1, 3] : [1, 2, 5];
  let ticks = [];
  for (let power = Math.floor(start); power <= Math.ceil(end); power++) {
    for (const digit of leading) {
      const value = Number((digit * 10 ** power).toPrecision(6));
      const isShown = leading.length > 1 || power % every === 0;
      if (isShown && Math.log10(value) >= start && Math.log10(value) <= end) ticks.push(value);
    }
  }
  if (ticks.length < 2) {  // less than an octave
    const plain = linearScale(low, high, pixels, { count, widen: false });
    ticks = plain.ticks.filter((tick) => tick > 0);
  }
  return { at, ticks, low: 10 ** start, high: 10 ** end };
}

/** Rounds to a number of digits, but to no less than ones. */
function rounded(value, digits) {
  const whole = Math.max(Math.floor(Math.log10(Math.abs(value))) + 1, 0);
  return String(Number(value.toPrecision(Math.min(Math.max(digits, whole), 15))));
}

function withoutZeros(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** A number in few characters: 1200, 45k, 3e-5. */
function shortNumber(value, digits = 3) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [limit, suffix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return rounded(value / (limit === 1e4 ? 1e3 : limit), digits) + suffix;
  }
  if (size < 1e-3) return value.toExponential(Math.max(digits - 2, 0)).replace(/\.?0*e/, "e").replace("e+", "e");
  return rounded(value, digits);
}

/** Text of a value: `format` is `share` (0.31 is 31%), `percent` (31 is 31%) or a unit that follows the number. */
function valueText(value, format, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (format === "share") return `${withoutZeros((value * 100).toFixed(digits > 3 ? 1 : 0))}%`;
  if (format === "percent") return `${withoutZeros(value.toFixed(digits > 3 ? 1 : 0))}%`;
  return shortNumber(value, digits) + (format ? ` ${format}` : "");
}

/** Texts of ticks, with as many digits as tell them apart. */
function tickTexts(ticks, format) {
  for (const digits of [2, 3, 4, 5, 6]) {
    const texts = ticks.map((tick) => tickText(tick, format, digits));
    if (new Set(texts).size === texts.length) return texts;
  }
  return ticks.map((tick) => String(tick));
}

function tickText(tick, format, digits) {
  if (format === "share" || format === "percent") return `${tick ? rounded(format === "share" ? tick * 100 : tick, digits) : 0}%`;
  return shortNumber(tick, digits);
}
