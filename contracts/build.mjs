// Compiles src/ with the pinned wasm solc and writes ../node/chain/abi/<Name>.json. Byte-reproducible: no metadata hash,
// no paths of this machine, sorted keys. `--check` writes nothing and fails when a committed artifact differs.
// `--src DIR --out DIR` serve the mutation tests.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import solc from 'solc';

const here = dirname(fileURLToPath(import.meta.url));
const argument = (name, fallback) => process.argv.includes(name) ? process.argv[process.argv.indexOf(name) + 1] : fallback;
const src = resolve(argument('--src', join(here, 'src')));
const out = resolve(argument('--out', join(here, '../node/chain/abi')));
const contracts = ['Vault', 'Workers', 'Channels', 'TestToken'];
const settings = {
  evmVersion: 'cancun',
  metadata: { appendCBOR: false, bytecodeHash: 'none' },
  optimizer: { enabled: true, runs: 200 },
};

const read = (path) => path.startsWith('src/') ? join(src, path.slice(4)) : join(here, 'node_modules', path);
const load = (path) => existsSync(read(path)) ? { contents: readFileSync(read(path), 'utf8') } : { error: `missing ${path}` };
const input = {
  language: 'Solidity',
  sources: Object.fromEntries(contracts.map((name) => [`src/${name}.sol`, { content: load(`src/${name}.sol`).contents }])),
  settings: { ...settings, outputSelection: { '*': { '*': ['abi', 'evm.bytecode.object', 'evm.deployedBytecode.object', 'evm.deployedBytecode.immutableReferences', 'metadata'] } } },
};
const output = JSON.parse(solc.compile(JSON.stringify(input), { import: load }));
// A warning about our own files is a failure too; libraries answer for theirs.
const problems = (output.errors ?? []).filter((e) => e.severity === 'error' || !e.sourceLocation?.file.startsWith('@'));
for (const problem of problems) console.error(problem.formattedMessage);
if (problems.length) process.exit(1);

const stale = [];
for (const name of contracts) {
  const { abi, evm, metadata } = output.contracts[`src/${name}.sol`][name];
  const paths = Object.keys(JSON.parse(metadata).sources).sort(); // every file that went into this contract
  const sources = Object.fromEntries(paths.map((path) => [path, createHash('sha256').update(readFileSync(read(path))).digest('hex')]));
  const immutables = Object.values(evm.deployedBytecode.immutableReferences ?? {}).flat().sort((a, b) => a.start - b.start);
  const artifact = {
    contractName: name, ...(name === 'TestToken' ? { devnetOnly: true } : {}), abi,
    bytecode: `0x${evm.bytecode.object}`, deployedBytecode: `0x${evm.deployedBytecode.object}`,
    immutableReferences: immutables, sources, compiler: solc.version(), settings,
  };
  const text = `${JSON.stringify(artifact, null, 1)}\n`;
  const path = join(out, `${name}.json`);
  if (!process.argv.includes('--check')) { mkdirSync(out, { recursive: true }); writeFileSync(path, text); }
  else if (!existsSync(path) || readFileSync(path, 'utf8') !== text) stale.push(name);
}
if (stale.length) { console.error(`stale artifacts: ${stale.join(', ')}; run: node contracts/build.mjs`); process.exit(1); }
