#!/usr/bin/env node
// Scores the sequences of a JSONL file with a running teacher, as `jdistill score --teacher` does: a client to start from.
//
// No number is believed before its reply has been checked: as it was sent and of which tokens (CRC-32), how many, in which order, by which model,
// at which temperature, and whether it can be a log-probability at all. A call that fails is made again as a whole, which
// is safe: scoring changes nothing.
'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const zlib = require('node:zlib');
const { parseArgs } = require('node:util');
const { setTimeout: sleep } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const HELP = `\
Score token sequences from a JSONL file with a running jdistill teacher.

  node score.js --teacher 127.0.0.1:50051 --input in.jsonl --output out.jsonl

Lines of input and output are those of \`jdistill score\`, whose --help describes them.

  --teacher HOST:PORT  address of the teacher
  --input FILE         JSONL file to read
  --output FILE        JSONL file to write; it appears only when all of it is there
  --temperature T      divides the logits (1)
  --model NAME         the served model or adapter (the base model)
  --deadline-s S       over all attempts of a call: how long a teacher may stay away (600)
  --tls-ca FILE        PEM: the authority that signed the teacher's certificate; with it, TLS
  --token-file FILE    its first word is sent as bearer token; read again for each attempt
  --help               this text

Exit codes: 0 all scored, 1 the teacher failed, 2 the arguments or the input are wrong.
`;

const GROUP_TOKENS = 16384; // of one call: enough to keep an engine busy
const CALLS_UNDER_WAY = 4;
const MAX_MESSAGE_BYTES = 256 << 20; // one 8,193-token sequence with top-64 is more than gRPC's default of 4 MiB

class UsageError extends Error {}
class VerificationError extends Error {}
// Worth another attempt, like a server that says UNAVAILABLE.
const unavailable = (what) => Object.assign(new Error(what), { code: grpc.status.UNAVAILABLE, details: what });

const load = (...parts) =>
  protoLoader.loadSync(path.join(__dirname, ...parts), { keepCase: true, longs: Number, defaults: true });
const wire = load('..', '..', '..', 'protos', 'jdistill', 'wire', 'v1', 'teacher.proto');
const { TeacherService } = grpc.loadPackageDefinition(wire).jdistill.wire.v1;
const rpc = load('..', 'status_details.proto');

// --- the input ---

function readItems(file) {
  if (!fs.existsSync(file)) throw new UsageError(`--input ${file}: there is no such file`);
  const items = fs
    .readFileSync(file, 'utf8')
    .split('\n')
    .map((text, i) => ({ text, line: i + 1 }))
    .filter(({ text }) => text.trim())
    .map(({ text, line }) => readItem(text, line, file));
  if (!items.length) throw new UsageError(`--input ${file} is empty: expected a JSON object a line, with token_ids`);
  return items;
}

function readItem(text, line, file) {
  const check = (good, what) => {
    if (!good) throw new UsageError(`${file}:${line}: ${what}`);
  };
  let data;
  try {
    data = JSON.parse(text);
  } catch (e) {
    check(false, `not JSON (${e.message})`);
  }
  check(data !== null && typeof data === 'object' && !Array.isArray(data), 'expected a JSON object with token_ids');
  const { id = null, token_ids, spans = null, top_k = 0, candidate_ids = null, ...others } = data;
  check(!Object.keys(others).length, `unknown key ${Object.keys(others)[0]}`);
  check(
    id === null || typeof id === 'string' || Number.isSafeInteger(id),
    'id: expected a string or an integer below 2^53',
  );
  // What the wire cannot hold is refused here: protobuf would send 2.5 as 2, and -1 as 4294967295.
  const isCount = (value) => Number.isInteger(value) && value >= 0 && value < 2 ** 32;
  const areCounts = (values) => Array.isArray(values) && values.every(isCount);
  check(
    areCounts(token_ids) && token_ids.length >= 2,
    'token_ids: expected at least 2 token ids; the first one has no score',
  );
  check(isCount(top_k), 'top_k: expected a whole number of at least 0');
  check(
    spans === null || (Array.isArray(spans) && spans.length && spans.every((s) => areCounts(s) && s.length === 2)),
    'spans: expected [[start, stop], ..]; leave it out to score all but the first token',
  );
  const wholeSpans = spans ?? [[1, token_ids.length]];
  const numScored = wholeSpans.reduce((sum, [start, stop]) => sum + stop - start, 0);
  const width = candidate_ids?.[0]?.length ?? 0;
  check(
    candidate_ids === null ||
      (Array.isArray(candidate_ids) &&
        candidate_ids.length === numScored &&
        width > 0 &&
        candidate_ids.every((row) => areCounts(row) && row.length === width)),
    `candidate_ids: expected ${numScored} rows, one a scored position, of one length`,
  );
  return { line, id: id ?? line, token_ids, spans: wholeSpans, numScored, top_k, candidate_ids, width };
}

// Neighbours that can share a call: of one top_k and one number of candidates.
function toGroups(items) {
  const groups = [];
  let tokens = 0;
  for (const item of items) {
    const last = groups.at(-1);
    tokens += item.token_ids.length;
    if (last && last[0].top_k === item.top_k && last[0].width === item.width && tokens <= GROUP_TOKENS) last.push(item);
    else {
      groups.push([item]);
      tokens = item.token_ids.length;
    }
  }
  return groups;
}

// --- one reply ---

// Bytes of numbers as they are on the wire: little-endian, as all of Node's platforms are but s390x.
const uints = (values) => Buffer.from(Uint32Array.from(values).buffer);
const floats = (values) => Buffer.from(Float32Array.from(values).buffer);

// "Checksums" in teacher.proto: the fields before payload_crc in the order of their numbers; all of them are set.
function payloadCrc(message, type) {
  const fields = type.type.field.filter(({ name }) => name !== 'payload_crc').sort((a, b) => a.number - b.number);
  let crc = 0;
  for (const { name, type } of fields) {
    const values = [].concat(message[name]);
    const bytes =
      { TYPE_STRING: () => Buffer.from(values[0]), TYPE_FLOAT: () => floats(values) }[type]?.() ?? uints(values);
    crc = zlib.crc32(uints([bytes.length]), crc);
    if (bytes.length) crc = zlib.crc32(bytes, crc); // of no bytes it is 0, whatever came before
  }
  return crc;
}

// Puts the chunks of one call together.
class Reply {
  constructor(items, model, temperature) {
    Object.assign(this, { items, model, temperature: Math.fround(temperature) }); // as it was on the wire
    this.crcs = items.map((item) => zlib.crc32(uints(item.token_ids)));
    this.scores = items.map(() => ({ logprobs: [], top_ids: [], top_logprobs: [], candidate_logprobs: [] }));
  }

  add(chunk) {
    const { top_k, width } = this.items[0];
    const check = (good, what) => {
      if (!good) throw new VerificationError(what);
    };
    if (chunk.payload_crc !== payloadCrc(chunk, wire['jdistill.wire.v1.ScoreSequencesResponse']))
      throw unavailable('a reply was changed on its way (payload_crc)');
    for (const name of ['fingerprint', 'tokenizer_fingerprint']) {
      check(
        chunk[name] === this.model[name],
        `${name} is ${chunk[name]}, at the beginning it was ${this.model[name]}: the teacher was exchanged`,
      );
    }
    check(
      chunk.temperature === this.temperature,
      `scored at temperature ${chunk.temperature}, asked for ${this.temperature}`,
    );
    const numEntries = chunk.sequence_indexes.length;
    for (const name of ['first_targets', 'target_counts', 'token_crcs']) {
      check(chunk[name].length === numEntries, `${numEntries} sequence_indexes but ${chunk[name].length} ${name}`);
    }
    const numTargets = chunk.target_counts.reduce((sum, count) => sum + count, 0);
    const widths = { logprobs: 1, top_ids: top_k, top_logprobs: top_k, candidate_logprobs: width };
    for (const [name, w] of Object.entries(widths)) {
      check(chunk[name].length === numTargets * w, `${chunk[name].length} ${name}, expected ${numTargets * w}`);
      // NaN <= 0 is false, and JSON has no -Infinity.
      if (name !== 'top_ids')
        check(
          chunk[name].every((x) => x <= 0 && x > -Infinity),
          `${name}: a log-probability is finite and at most 0`,
        );
    }
    check(
      chunk.top_ids.every((id) => id < this.model.vocab_size),
      'top_ids outside the vocabulary',
    );
    check(
      chunk.top_logprobs.every((x, i) => i % top_k === 0 || x <= chunk.top_logprobs[i - 1]),
      'top_logprobs are not in descending order',
    );
    let offset = 0;
    chunk.sequence_indexes.forEach((b, e) => {
      const count = chunk.target_counts[e];
      const item = this.items[b];
      check(item, `scores of sequence ${b} of ${this.items.length}`);
      check(chunk.token_crcs[e] === this.crcs[b], `line ${item.line}: other token ids were scored than were sent`);
      const received = this.scores[b].logprobs.length;
      check(
        chunk.first_targets[e] === received && count > 0 && received + count <= item.numScored,
        `line ${item.line}: scores [${chunk.first_targets[e]}, ${chunk.first_targets[e] + count}) came after ${received} of ${item.numScored}`,
      );
      for (const [name, w] of Object.entries(widths)) {
        for (let i = offset * w; i < (offset + count) * w; i++) this.scores[b][name].push(chunk[name][i]);
      }
      offset += count;
    });
  }

  finish() {
    this.items.forEach((item, b) => {
      const received = this.scores[b].logprobs.length;
      if (received !== item.numScored)
        throw new VerificationError(
          `line ${item.line}: the stream ended after ${received} of ${item.numScored} scores`,
        );
    });
    return this.scores;
  }
}

// --- calls ---

class Teacher {
  constructor(options) {
    this.options = options;
    // The token goes into the metadata of each call; with TLS alone it is safe from everybody on the way.
    const credentials = options['tls-ca']
      ? grpc.credentials.createSsl(fs.readFileSync(options['tls-ca']))
      : grpc.credentials.createInsecure();
    this.stub = new TeacherService(options.teacher, credentials, {
      'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
      'grpc.max_send_message_length': MAX_MESSAGE_BYTES,
      'grpc.keepalive_time_ms': 20000, // a dead peer is found within 40 s, also in a long prefill
      'grpc.keepalive_timeout_ms': 20000,
      'grpc.enable_retries': 0, // attempt() decides
      'grpc.initial_reconnect_backoff_ms': 100,
      'grpc.max_reconnect_backoff_ms': 1000, // else a teacher that is back waits for up to two minutes
    });
  }

  metadata() {
    const metadata = new grpc.Metadata();
    if (this.options['token-file'])
      metadata.set(
        'authorization',
        `Bearer ${fs.readFileSync(this.options['token-file'], 'utf8').trim().split(/\s/)[0]}`,
      );
    return metadata;
  }

  // Calls call(deadline) until it succeeds, fails for good, or the deadline has passed.
  async attempt(call) {
    const deadline = Date.now() + 1000 * this.options.deadlineS;
    for (let backoffMs = 200; ; backoffMs = Math.min(2 * backoffMs, 2000)) {
      try {
        return await call(deadline);
      } catch (e) {
        const { retryAfterMs } = details(e);
        // RESOURCE_EXHAUSTED without RetryInfo is gRPC's own limit on a message: the next attempt would end alike.
        const again =
          e.code === grpc.status.UNAVAILABLE ||
          (e.code === grpc.status.RESOURCE_EXHAUSTED && retryAfterMs !== undefined) ||
          (e.code === grpc.status.INTERNAL && /RST_STREAM/.test(e.details)); // a connection that broke
        const waitMs = Math.max(retryAfterMs ?? 0, backoffMs) * (1 + 0.2 * Math.random()); // clients must not come back in step
        if (!again || Date.now() + waitMs > deadline) throw e;
        process.stderr.write(`${describe(e)}; again in ${(waitMs / 1000).toFixed(1)} s\n`);
        await sleep(waitMs);
      }
    }
  }

  // What is served under --model; while the server loads, nothing is.
  info() {
    return this.attempt(
      (deadline) =>
        new Promise((resolve, reject) => {
          this.stub.GetServerInfo({}, this.metadata(), { deadline }, (error, info) => {
            if (error) return reject(error);
            if (!info.models.length) return reject(unavailable('the teacher loads its model'));
            const model = info.models.find((m) => m.model === (this.options.model || info.models[0].model));
            return model
              ? resolve(model)
              : reject(
                  new UsageError(
                    `--model ${this.options.model}: there is ${info.models.map((m) => m.model).join(', ')}`,
                  ),
                );
          });
        }),
    );
  }

  score(items, model) {
    const request = {
      model: this.options.model,
      expected_fingerprint: model.fingerprint,
      temperature: this.options.temperature,
      top_k: items[0].top_k,
      request_id: crypto.randomUUID(),
      max_chunk_bytes: 0, // the server's choice
      sequence_lengths: items.map((item) => item.token_ids.length),
      token_ids: items.flatMap((item) => item.token_ids),
      span_counts: items.map((item) => item.spans.length),
      span_starts: items.flatMap((item) => item.spans.map(([start]) => start)),
      span_ends: items.flatMap((item) => item.spans.map(([, stop]) => stop)),
      candidate_count: items[0].width,
      candidate_ids: items.flatMap((item) => (item.candidate_ids ?? []).flat()),
      prefix_lengths: [],
      prefix_replaced: [],
      prefix_token_ids: [],
    };
    request.payload_crc = payloadCrc(request, wire['jdistill.wire.v1.ScoreSequencesRequest']);
    return this.attempt(async (deadline) => {
      const reply = new Reply(items, model, this.options.temperature);
      const stream = this.stub.ScoreSequences(request, this.metadata(), { deadline });
      try {
        for await (const chunk of stream) reply.add(chunk);
        return reply.finish(); // only an OK stream gets here
      } catch (e) {
        stream.cancel(); // a reply that is wrong: the rest of it is not wanted
        const { sequence } = details(e);
        if (sequence !== undefined) e.details = `line ${items[sequence].line}: ${e.details}`; // the server says which one
        throw e;
      }
    });
  }
}

// What google.rpc.Status says about a failed call; nothing parses the text of an error.
function details(error) {
  const result = {};
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!bytes) return result;
  for (const { type_url, value } of rpc['google.rpc.Status'].deserialize(bytes).details) {
    if (type_url.endsWith('/google.rpc.RetryInfo')) {
      const { seconds, nanos } = rpc['google.rpc.RetryInfo'].deserialize(value).retry_delay;
      result.retryAfterMs = 1000 * seconds + nanos / 1e6;
    } else if (type_url.endsWith('/google.rpc.ErrorInfo')) {
      Object.assign(result, rpc['google.rpc.ErrorInfo'].deserialize(value).metadata);
    }
  }
  return result;
}

const describe = (e) =>
  e.code === undefined ? e.message : `${grpc.status[e.code] ?? e.code}: ${e.details ?? e.message}`;

// --- the output ---

// The shortest decimal that reads back as the same float32.
function shortest(x) {
  for (let digits = 1; digits < 9; digits++)
    if (Math.fround(Number(x.toPrecision(digits))) === x) return Number(x.toPrecision(digits));
  return Number(x.toPrecision(9));
}

function formatLine(item, scores) {
  const rows = (values, width) =>
    Array.from({ length: item.numScored }, (_, p) => values.slice(p * width, (p + 1) * width));
  const record = { id: item.id, logprobs: scores.logprobs.map(shortest) };
  if (item.top_k)
    Object.assign(record, {
      top_ids: rows(scores.top_ids, item.top_k),
      top_logprobs: rows(scores.top_logprobs.map(shortest), item.top_k),
    });
  if (item.width) record.candidate_logprobs = rows(scores.candidate_logprobs.map(shortest), item.width);
  return JSON.stringify(record);
}

function readOptions() {
  const names = ['teacher', 'input', 'output', 'temperature', 'model', 'deadline-s', 'tls-ca', 'token-file'];
  let values;
  try {
    ({ values } = parseArgs({
      options: { help: { type: 'boolean' }, ...Object.fromEntries(names.map((n) => [n, { type: 'string' }])) },
    }));
  } catch (e) {
    throw new UsageError(e.message);
  }
  if (values.help) return null;
  for (const name of ['teacher', 'input', 'output'])
    if (!values[name]) throw new UsageError(`--${name} is missing; --help says more`);
  for (const name of ['tls-ca', 'token-file'])
    if (values[name] && !fs.existsSync(values[name]))
      throw new UsageError(`--${name} ${values[name]}: there is no such file`);
  const number = (name, standard) => {
    const value = Number(values[name] ?? standard);
    if (!(value > 0 && value < Infinity)) throw new UsageError(`--${name} ${values[name]}: expected a number above 0`);
    return value;
  };
  return {
    ...values,
    model: values.model ?? '',
    temperature: number('temperature', 1),
    deadlineS: number('deadline-s', 600),
  };
}

async function main() {
  const options = readOptions();
  if (options === null) return void process.stdout.write(HELP);
  const groups = toGroups(readItems(options.input)); // the whole input is checked before anything is scored
  const teacher = new Teacher(options);
  const model = await teacher.info();
  const results = new Array(groups.length);
  let next = 0;
  const work = async () => {
    while (next < groups.length) {
      const g = next++;
      results[g] = await teacher.score(groups[g], model);
    }
  };
  await Promise.all(Array.from({ length: CALLS_UNDER_WAY }, work));
  const lines = groups.flatMap((items, g) => items.map((item, b) => `${formatLine(item, results[g][b])}\n`));
  const temporary = `${options.output}.${process.pid}.tmp`;
  fs.writeFileSync(temporary, lines.join(''));
  fs.renameSync(temporary, options.output); // at once: a reader sees all of it or what was there before
  process.stderr.write(`scored ${lines.length} sequences with ${model.model} -> ${options.output}\n`);
}

main().then(
  () => process.exit(0),
  (e) => {
    process.stderr.write(`error: ${describe(e)}\n`);
    process.exit(e instanceof UsageError ? 2 : 1);
  },
);
