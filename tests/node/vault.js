// What a program does with node-vault: each step is one line of JSON.
const [modules, endpoint, token] = process.argv.slice(2);
const client = require(modules)({ apiVersion: 'v1', endpoint, token });

async function told(step) {
  try {
    const result = await step();
    return { ok: result === undefined || result === '' ? null : result };
  } catch (error) {
    const response = error.response || {};
    return { status: response.statusCode ?? null, errors: (response.body || {}).errors ?? error.message };
  }
}

const nobody = require(modules)({ apiVersion: 'v1', endpoint, token: 'hvs.unknown' });
const steps = {
  health: () => client.health(),
  write: () => client.write('secret/data/team/db', { data: { user: 'ann', n: 1 } }),
  read: () => client.read('secret/data/team/db'),
  cas: () => client.write('secret/data/team/db', { data: { n: 2 }, options: { cas: 1 } }),
  mismatch: () => client.write('secret/data/team/db', { data: { n: 3 }, options: { cas: 1 } }),
  exists: () => client.write('secret/data/team/db', { data: { n: 3 }, options: { cas: 0 } }),
  list: () => client.list('secret/metadata/'),
  below: () => client.list('secret/metadata/team'),
  get: () => client.read('secret/metadata/team?list=1'),
  metadata: () => client.read('secret/metadata/team/db'),
  older: () => client.read('secret/data/team/db?version=1'),
  self: () => client.tokenLookupSelf(),
  nobody: () => nobody.read('secret/data/team/db'),
  lookup: () => nobody.tokenLookupSelf(),
  patch: () => client.update('secret/data/team/db', { data: { n: 4 } }),
  remove: () => client.delete('secret/data/team/db'),
  absent: () => client.read('secret/data/team/db'),
  again: () => client.delete('secret/data/team/db'),
  none: () => client.list('secret/metadata/team'),
};

(async () => {
  for (const [name, step] of Object.entries(steps)) {
    console.log(JSON.stringify([name, await told(step)]));
  }
})();
