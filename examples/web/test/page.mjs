// Opens the page of a folder in headless Chromium, as a visitor would, and prints what it reports as a line of JSON.
//
//   node page.mjs FOLDER CHROMIUM [SCREENSHOT.png]
//
// WebGPU runs on the processor (SwiftShader, which comes with Chromium).

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { extname, join, normalize } from "node:path";

const [folder, executablePath, screenshot] = process.argv.slice(2);
// The driver is one of the packages of `web/`.
const { chromium } = createRequire(new URL("../../../web/package.json", import.meta.url))("playwright-core");

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".json": "application/json" };
const server = createServer(async (request, answer) => {
  const asked = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  const path = asked === "/" ? "/index.html" : asked;
  try {
    const body = await readFile(join(folder, path));
    answer.writeHead(200, { "content-type": TYPES[extname(path)] ?? "text/plain; charset=utf-8" }).end(body);
  } catch {
    answer.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));

const browser = await chromium.launch({
  executablePath,
  ignoreDefaultArgs: ["--disable-gpu"],
  args: ["--no-sandbox", "--enable-unsafe-webgpu"],
});
try {
  const page = await browser.newPage({ viewport: { width: 1100, height: 900 } });
  const said = [];
  page.on("pageerror", (e) => said.push(e.message));
  page.on("console", (m) => m.type() === "error" && said.push(m.text()));
  await page.goto(`http://localhost:${server.address().port}/`);
  await page.waitForFunction(() => window.report !== undefined, null, { polling: 200, timeout: 110_000 }).catch(async (e) => {
    const status = await page.evaluate(() => document.getElementById("status").textContent);
    throw new Error(`${status} ${said.join("; ")}: ${e.message}`);
  });
  const report = await page.evaluate(() => window.report);
  const seen = await page.evaluate(() => {
    const canvas = document.getElementById("heat");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const colours = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) colours.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
    return { status: document.getElementById("status").textContent, colours: colours.size, lacks: document.querySelectorAll("#lacks li").length };
  });
  if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });
  console.log(JSON.stringify({ ...report, ...seen, said }));
} finally {
  await browser.close();
  server.close();
}
