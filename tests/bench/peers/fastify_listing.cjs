// The cached listing over Fastify and @fastify/jwt with its cache of verified tokens: `node fastify_listing.cjs TASK PORT`.
'use strict'

const { createPublicKey } = require('node:crypto')
const { readFileSync } = require('node:fs')
const fastify = require('fastify')()

const task = JSON.parse(readFileSync(process.argv[2], 'utf8'))
const [jwk] = JSON.parse(readFileSync(task.jwks, 'utf8')).keys
const publicKey = createPublicKey({ key: jwk, format: 'jwk' }).export({ type: 'spki', format: 'pem' })
const pages = new Map([[`${task.subject} ${task.path}?${task.query}`, readFileSync(task.body)]])

fastify.register(require('@fastify/jwt'), {
  secret: { public: publicKey },
  verify: { algorithms: ['ES256'], allowedIss: task.issuer, allowedAud: task.audience, cache: 10000 }
})

fastify.get(task.path, { onRequest: (request) => request.jwtVerify() }, async (request, reply) => {
  const page = pages.get(`${request.user.sub} ${request.url}`)
  if (page === undefined) {
    return reply.code(404).send()
  }
  reply.type('application/json').header('cache-control', 'private, no-cache').header('etag', task.etag)
  return reply.send(page)
})

fastify.listen({ host: '127.0.0.1', port: Number(process.argv[3]) })
