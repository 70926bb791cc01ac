// The cached listing as a worker: WebCrypto, and a bounded cache of verified tokens, as long as they hold.

const TOKENS_MAX = 10000
const tokens = new Map()
let keys
let pages

const bytes = (text) => Uint8Array.from(atob(text.replaceAll('-', '+').replaceAll('_', '/')), (c) => c.charCodeAt(0))
const json = (part) => JSON.parse(new TextDecoder().decode(bytes(part)))

async function importKeys(set) {
  const imported = new Map()
  for (const jwk of set.keys) {
    imported.set(jwk.kid, await crypto.subtle.importKey('jwk', jwk, { name: 'ECDSA', namedCurve: 'P-256' }, false, ['verify']))
  }
  return imported
}

async function verify(token, env) {
  const parts = token.split('.')
  if (parts.length !== 3) return null
  const header = json(parts[0])
  keys ??= await importKeys(env.JWKS)
  const key = keys.get(header.kid)
  if (header.alg !== 'ES256' || key === undefined) return null
  const signed = new TextEncoder().encode(`${parts[0]}.${parts[1]}`)
  if (!(await crypto.subtle.verify({ name: 'ECDSA', hash: 'SHA-256' }, key, bytes(parts[2]), signed))) return null
  const claims = json(parts[1])
  if (claims.iss !== env.TASK.issuer || claims.aud !== env.TASK.audience) return null
  return claims.exp > Date.now() / 1000 ? claims : null
}

async function believed(authorization, env) {
  if (authorization === null || !authorization.startsWith('Bearer ')) return null
  const known = tokens.get(authorization)
  if (known !== undefined && known.exp > Date.now() / 1000) return known
  const claims = await verify(authorization.slice(7), env).catch(() => null)
  if (claims === null) return null
  if (tokens.size >= TOKENS_MAX) tokens.delete(tokens.keys().next().value)
  tokens.set(authorization, claims)
  return claims
}

export default {
  async fetch(request, env) {
    const { TASK } = env
    const claims = await believed(request.headers.get('Authorization'), env)
    if (claims === null) return new Response(null, { status: 401, headers: { 'WWW-Authenticate': 'Bearer' } })
    pages ??= new Map([[`${TASK.subject} ${TASK.path}?${TASK.query}`, env.BODY]])
    const url = new URL(request.url)
    const page = pages.get(`${claims.sub} ${url.pathname}${url.search}`)
    if (page === undefined) return new Response(null, { status: 404 })
    return new Response(page, {
      headers: { 'Content-Type': 'application/json', 'Cache-Control': 'private, no-cache', ETag: TASK.etag }
    })
  }
}
