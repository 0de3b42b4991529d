#!lua flags=allow-oom
-- Send again what is overdue, and return all jobs. With a message in the queue for each of them,
-- more are no help.
local overdue, now = ARGV[1], redis.call('TIME')[1]
local jobs = redis.call('ZRANGE', 'faces:jobs', 0, -1)
if redis.call('LLEN', 'faces:queue') >= #jobs then return jobs end
for _, id in ipairs(redis.call('ZRANGE', 'faces:jobs', '-inf', now, 'BYSCORE')) do
  local message = redis.call('HGET', 'faces:photo:' .. id, 'message')
  if message then
    redis.call('LPUSH', 'faces:queue', message)
    redis.call('ZADD', 'faces:jobs', now + overdue, id)
  else  -- a stranger has listed it
    redis.call('ZREM', 'faces:jobs', id)
  end
end
return jobs
