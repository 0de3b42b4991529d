#!lua flags=allow-oom
-- Send again what is overdue. With a message in the queue for each photo, more are no help.
local overdue, now = ARGV[1], redis.call('TIME')[1]
if redis.call('LLEN', 'faces:queue') >= redis.call('ZCARD', 'faces:jobs') then return end
for _, id in ipairs(redis.call('ZRANGE', 'faces:jobs', '-inf', now, 'BYSCORE')) do
  local message = redis.call('HGET', 'faces:photo:' .. id, 'message')
  if message then
    redis.call('LPUSH', 'faces:queue', message)
    redis.call('ZADD', 'faces:jobs', now + overdue, id)
  else  -- a stranger has listed it
    redis.call('ZREM', 'faces:jobs', id)
  end
end
