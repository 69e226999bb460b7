// Compiles the contracts with the pinned wasm solc and writes ../node/chain/abi/<Name>.json, and the strange tokens and
// wallets and resolvers of test/zoo/ into ../tests/contracts/zoo/. Byte-reproducible: no metadata hash, no paths of this machine.
// `--check` writes nothing and fails when a committed artifact differs. `--src DIR --out DIR`: other sources, no governance and
// no zoo; with `--only NAME` one contract of them.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import solc from 'solc';

const here = dirname(fileURLToPath(import.meta.url));
const argument = (name, fallback) => process.argv.includes(name) ? process.argv[process.argv.indexOf(name) + 1] : fallback;
const src = resolve(argument('--src', join(here, 'src')));
const out = resolve(argument('--out', join(here, '../node/chain/abi')));
const zoo = join(here, '../tests/contracts/zoo');
const money = ['Vault', 'Workers', 'Channels', 'Jobs', 'Disputes', 'Committee', 'VerifierResolver', 'Attestations', 'TestToken'];
const only = argument('--only', '');
const targets = money.filter((name) => !only || name === only).map((name) => ({ file: `src/${name}.sol`, name, out }));
if (!process.argv.includes('--src')) {
  for (const name of ['MillToken', 'MillGovernor']) targets.push({ file: `src/governance/${name}.sol`, name, out });
  targets.push({ file: '@openzeppelin/contracts/governance/TimelockController.sol', name: 'TimelockController', out });
  const strange = { Zoo: ['FeeToken', 'NoReturnToken', 'FalseToken', 'ReentrantToken', 'RebasingToken', 'PausableToken', 'FallbackToken', 'Wallet', 'Greedy'], Resolvers: ['StrangeResolver', 'ProofStub'] };
  for (const [file, names] of Object.entries(strange)) {
    for (const name of names) targets.push({ file: `test/zoo/${file}.sol`, name, out: zoo });
  }
}
const settings = {
  evmVersion: 'cancun',
  metadata: { appendCBOR: false, bytecodeHash: 'none' },
  optimizer: { enabled: true, runs: 20000 },
};

const read = (path) => path.startsWith('src/') ? join(src, path.slice(4)) : join(here, path.startsWith('@') ? 'node_modules' : '.', path);
const load = (path) => existsSync(read(path)) ? { contents: readFileSync(read(path), 'utf8') } : { error: `missing ${path}` };
const outputs = ['abi', 'evm.bytecode.object', 'evm.deployedBytecode.object', 'evm.deployedBytecode.immutableReferences', 'metadata'];
const input = {
  language: 'Solidity',
  sources: Object.fromEntries(targets.map(({ file }) => [file, { content: load(file).contents }])),
  settings: { ...settings, outputSelection: { '*': { '*': outputs } } },
};
const output = JSON.parse(solc.compile(JSON.stringify(input), { import: load }));
// A warning about our own files is a failure too; libraries answer for theirs, and the zoo is strange on purpose.
const problems = (output.errors ?? []).filter((e) => e.severity === 'error' || e.sourceLocation?.file.startsWith('src/'));
for (const problem of problems) console.error(problem.formattedMessage);
if (problems.length) process.exit(1);

const stale = [];
for (const { file, name, out } of targets) {
  const { abi, evm, metadata } = output.contracts[file][name];
  const paths = Object.keys(JSON.parse(metadata).sources).sort(); // every file that went into this contract
  const sources = Object.fromEntries(paths.map((path) => [path, createHash('sha256').update(readFileSync(read(path))).digest('hex')]));
  const immutables = Object.values(evm.deployedBytecode.immutableReferences ?? {}).flat().sort((a, b) => a.start - b.start);
  const artifact = {
    contractName: name, ...(name === 'TestToken' || out === zoo ? { devnetOnly: true } : {}), abi,
    bytecode: `0x${evm.bytecode.object}`, deployedBytecode: `0x${evm.deployedBytecode.object}`,
    immutableReferences: immutables, sources, compiler: solc.version(), settings,
  };
  const text = `${JSON.stringify(artifact, null, 1)}\n`;
  const path = join(out, `${name}.json`);
  if (!process.argv.includes('--check')) { mkdirSync(out, { recursive: true }); writeFileSync(path, text); }
  else if (!existsSync(path) || readFileSync(path, 'utf8') !== text) stale.push(name);
}
if (stale.length) { console.error(`stale artifacts: ${stale.join(', ')}; run: node contracts/build.mjs`); process.exit(1); }
