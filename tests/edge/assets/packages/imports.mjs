// The literal imports of scripts, by a lexer that Weft has no part in: file names on stdin, one JSON line for each on stdout.
import { init, parse } from 'es-module-lexer';
import { readFileSync } from 'node:fs';

await init;
for (const file of readFileSync(0, 'utf8').split('\n').filter(Boolean)) {
  const source = readFileSync(file, 'utf8');
  let found = null;
  try {
    found = parse(source)[0].filter((one) => one.n !== undefined).map((one) => one.n);
  } catch {
    // not a module: the lexer says so and so does the test
  }
  console.log(JSON.stringify({ file, found }));
}
