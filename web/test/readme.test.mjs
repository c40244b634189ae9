// What the README shows compiles.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import test from "node:test";
import { fileURLToPath } from "node:url";

const web = dirname(dirname(fileURLToPath(import.meta.url)));

test("the README's code compiles", () => {
  const text = readFileSync(join(web, "README.md"), "utf8");
  const blocks = [...text.matchAll(/^```ts\n(.*?)^```/gms)].map((m) => m[1]);
  assert.ok(blocks.length > 0);
  const folder = mkdtempSync(join(web, "dist-readme-"));
  try {
    blocks.forEach((b, i) => writeFileSync(join(folder, `block${i}.ts`), b));
    const options = ["--ignoreConfig", "--noEmit", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom", "--types", "", "--strict"];
    const files = blocks.map((_, i) => join(folder, `block${i}.ts`));
    const { status, stdout } = spawnSync(join(web, "node_modules/.bin/tsc"), [...options, ...files], { cwd: folder, encoding: "utf8" });
    assert.equal(status, 0, stdout);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
