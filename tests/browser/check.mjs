// Open every page of the built book in Chromium, as a reader would from the disk.
//
//   node tests/browser/check.mjs _build/html [part of a page's name]
//
// Each page is looked at three times (light, dark, and 360 pixels wide), with everything
// folded opened. What fails: an error in the console, a request that leaves the page's
// folder, a broken picture, a violation that axe-core finds, sideways overflow.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { execSync } from "node:child_process";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const root = path.resolve(process.argv[2] ?? "_build/html");
const wanted = process.argv[3] ?? "";
const axe = fs.readFileSync(
  createRequire(import.meta.url).resolve("axe-core/axe.min.js"),
  "utf8",
);
const VIEWS = [
  { name: "light", theme: "light", width: 1280 },
  { name: "dark", theme: "dark", width: 1280 },
  { name: "narrow", theme: "light", width: 360 },
];

function findBrowser() {
  const names = ["chromium", "chromium-browser", "google-chrome", "chrome"];
  for (const name of [process.env.CHROMIUM, ...names].filter(Boolean)) {
    try {
      return execSync(`command -v "${name}"`, { encoding: "utf8" }).trim();
    } catch {
      // the next one
    }
  }
  throw new Error("no Chromium found: install it or name it in CHROMIUM");
}

function* htmlFiles(folder) {
  for (const entry of fs.readdirSync(folder, { withFileTypes: true })) {
    const there = path.join(folder, entry.name);
    if (entry.isDirectory() && !entry.name.startsWith("_")) yield* htmlFiles(there);
    else if (entry.name.endsWith(".html")) yield there;
  }
}

// In the page: everything that is folded is opened, as if by clicks.
function openEverything() {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const button of document.querySelectorAll("button.toggle-button-hidden"))
    button.click();
  for (const image of document.images) image.loading = "eager";
}

// In the page: pictures that did not arrive.
function brokenPictures() {
  return [...document.images]
    .filter((image) => !image.complete || image.naturalWidth === 0)
    .map((image) => image.src.slice(0, 100));
}

// In the page: how far it can be scrolled sideways, and what sticks out.
function overflow() {
  const page = document.documentElement;
  const over = page.scrollWidth - page.clientWidth;
  if (over <= 0) return null;
  const out = [...document.querySelectorAll("main *")]
    .filter((node) => node.getBoundingClientRect().right > page.clientWidth + 1)
    .slice(0, 3)
    .map((node) => node.outerHTML.slice(0, 80));
  return `${over} px wider than the window: ${out.join(" ")}`;
}

// After a resize the theme waits 300 ms before it marks what scrolls.
async function settled(page) {
  await page.waitForFunction(() => document.readyState === "complete");
  await page.evaluate(async () => {
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
    await document.fonts.ready;
  });
  await page.waitForTimeout(400);
}

// Everything that is wrong with the page in one view.
async function faults(page, view) {
  const found = [];
  await page.setViewportSize({ width: view.width, height: 900 });
  await page.emulateMedia({ colorScheme: view.theme, reducedMotion: "reduce" });
  await page.evaluate((theme) => {
    document.documentElement.dataset.theme = theme;
    document.documentElement.dataset.mode = theme;
  }, view.theme);
  await settled(page);
  for (const source of await page.evaluate(brokenPictures))
    found.push(`broken picture: ${source}`);
  const over = await page.evaluate(overflow);
  if (over) found.push(over);
  const report = await page.evaluate(() =>
    // preload would fetch the style sheets again, which file:// does not allow
    globalThis.axe.run(document, { resultTypes: ["violations"], preload: false }),
  );
  for (const { id, help, nodes } of report.violations) {
    found.push(`axe ${id}: ${help} (${nodes.length} places)`);
    for (const node of nodes.slice(0, 2))
      found.push(`    ${node.target.join(" ")} | ${node.html.slice(0, 120)}`);
  }
  return found;
}

// What a page says while it loads and is looked at, by view; empty if all is well.
async function look(browser, file) {
  const page = await browser.newPage();
  const said = { always: [] };
  page.on("console", (message) => {
    if (message.type() === "error") said.always.push(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => said.always.push(`error: ${error}`));
  page.on("request", (request) => {
    if (!/^(file|data|blob|about):/.test(request.url()))
      said.always.push(`leaves the page: ${request.url()}`);
  });
  page.on("requestfailed", (request) => said.always.push(`missing: ${request.url()}`));
  await page.goto(pathToFileURL(file).href);
  await settled(page);
  await page.evaluate(openEverything);
  await page.evaluate(axe);
  for (const view of VIEWS) said[view.name] = await faults(page, view);
  await page.close();
  return Object.entries(said).filter(([, lines]) => lines.length > 0);
}

const files = [...htmlFiles(root)].sort().filter((file) => file.includes(wanted));
if (files.length === 0) throw new Error(`no pages in ${root}`);
const browser = await chromium.launch({
  executablePath: findBrowser(),
  args: ["--no-sandbox", "--disable-gpu"],
});
let bad = 0;
for (const file of files) {
  const said = await look(browser, file);
  if (said.length > 0) bad += 1;
  for (const [view, lines] of said) {
    console.log(`${path.relative(root, file)} (${view})`);
    for (const line of new Set(lines)) console.log(`  ${line}`);
  }
}
await browser.close();
console.log(`${files.length} pages seen ${VIEWS.length} times, ${bad} with problems`);
process.exitCode = bad ? 1 : 0;
