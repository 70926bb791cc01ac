-- What wrk runs: with an argument every request has a header of that name with a value that was never sent before, of the
-- form of a traceparent. At the end the figures as one line of JSON; latencies in microseconds.

function init(args)
  local name = args[#args]
  if #args == 0 or name:find("://") then
    return
  end
  math.randomseed(os.time())
  local before = wrk.format():sub(1, -3)
  local mark = string.format("%08x%08x", math.random(0, 2 ^ 31 - 1), math.random(0, 2 ^ 31 - 1))
  local sent = 0
  function request()
    sent = sent + 1
    return before .. string.format("%s: 00-%s%016x-%016x-01\r\n\r\n", name, mark, sent, sent)
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"refused":%d,"broken":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout
  ))
end
