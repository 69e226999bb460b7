// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {Signatures} from "./Signatures.sol";
import {IJobs} from "./interfaces/IJobs.sol";
import {IVault} from "./interfaces/IVault.sol";
import {IWorkers} from "./interfaces/IWorkers.sol";

contract Jobs is IJobs, EIP712 {
    using Signatures for address;

    bytes32 private constant QUOTE_TYPE = keccak256(
        "Quote(bytes32 specHash,address client,address worker,address token,uint128 amount,uint128 penalty,uint40 validBefore,uint40 deadline,uint40 window,address resolver,bytes32 salt)"
    );
    bytes32 private constant ORDER_TYPE = keccak256("Order(bytes32 jobId)");
    bytes32 private constant SUBMISSION_TYPE = keccak256("Submission(bytes32 jobId,bytes32 resultHash,uint128 claimed)");
    bytes32 private constant ACCEPTANCE_TYPE = keccak256("Acceptance(bytes32 jobId,bytes32 resultHash,uint128 amount)");

    uint40 public constant MIN_WINDOW = 15 minutes;
    uint40 public constant MAX_WINDOW = 7 days;
    uint40 public constant MAX_DURATION = 30 days;
    uint128 public constant FAIL_DIVISOR = 4;

    IVault public immutable vault;
    IWorkers public immutable workers;

    /// @dev Result of a job that has none, from its opening on. A result of this value, or of zero, is refused.
    bytes32 private constant NO_RESULT = bytes32(uint256(1));

    /// @dev Two slots: what moves, and the result. An ended job has an empty first slot, for which the chain gives gas back,
    /// and its result tells how it ended: NO_RESULT when it was refunded, else settled. Whoever opens a job pays for both
    /// slots, so that the ends, which strangers bring about, are cheap.
    /// `tag` is the beginning of the result's hash, so that an acceptance is compared without reading the second slot. Making
    /// two results with one tag takes about 2^40 tries, and gains nothing: what is paid is the amount that the client signed.
    struct Record {
        State state;
        uint40 windowEnd;
        uint128 claimed;
        bytes10 tag;
        bytes32 result;
    }

    mapping(bytes32 jobId => Record) private _records;

    modifier onlyModule() {
        if (!vault.isModule(msg.sender)) revert Jobs_NotModule(msg.sender);
        _;
    }

    constructor(IVault vault_, IWorkers workers_) EIP712("Gristmill", "1") {
        if (address(vault_).code.length == 0) revert Jobs_NotAContract(address(vault_));
        if (address(workers_).code.length == 0) revert Jobs_NotAContract(address(workers_));
        vault = vault_;
        workers = workers_;
    }

    /// @inheritdoc IJobs
    function open(Quote calldata quote, bytes calldata workerSignature, bytes calldata clientSignature)
        external
        returns (bytes32 jobId)
    {
        if (quote.client == address(0) || quote.worker == address(0)) revert Jobs_ZeroAddress();
        if (quote.amount == 0) revert Jobs_ZeroAmount();
        if (block.timestamp >= quote.validBefore) revert Jobs_Expired(quote.validBefore, block.timestamp);
        if (block.timestamp >= quote.deadline || quote.deadline > block.timestamp + MAX_DURATION) {
            revert Jobs_DeadlineOutOfRange(quote.deadline, block.timestamp);
        }
        if (quote.window < MIN_WINDOW || quote.window > MAX_WINDOW) revert Jobs_WindowOutOfRange(quote.window);
        jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        if (found.state != State.None || found.result != 0) revert Jobs_WrongState(jobId, job(jobId).state);
        if (workers.isRetired(quote.worker)) revert Jobs_WorkerRetired(quote.worker);
        // Else a client could open what the worker's node never hears of, and be paid for the silence.
        if (quote.penalty > 0 && !_isWorker(quote, msg.sender)) revert Jobs_NotWorker(jobId, msg.sender);
        _requireSigner(jobId, quote.worker, jobId, workerSignature);
        if (msg.sender != quote.client) _requireSigner(jobId, quote.client, orderDigest(jobId), clientSignature);

        found.state = State.Open;
        found.result = NO_RESULT;

        emit Opened(jobId, quote.client, quote.worker, quote);

        vault.lock(quote.token, quote.client, quote.amount);
        if (quote.penalty > 0) workers.hold(quote.worker, quote.token, quote.penalty);
    }

    /// @inheritdoc IJobs
    function submit(Quote calldata quote, bytes32 resultHash, uint128 claimed, bytes calldata signature) external {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        if (found.state != State.Open) revert Jobs_WrongState(jobId, job(jobId).state);
        if (block.timestamp >= quote.deadline) revert Jobs_TooLate(jobId, quote.deadline, block.timestamp);
        if (claimed > quote.amount) revert Jobs_OverAmount(jobId, quote.amount, claimed);
        if (uint256(resultHash) <= uint256(NO_RESULT)) revert Jobs_NoResult(jobId);
        if (msg.sender != quote.worker) {
            _requireSigner(jobId, quote.worker, submissionDigest(jobId, resultHash, claimed), signature);
        }

        uint40 windowEnd = uint40(block.timestamp) + quote.window;
        _records[jobId] = Record(State.Submitted, windowEnd, claimed, bytes10(resultHash), resultHash);

        emit Submitted(jobId, resultHash, claimed, windowEnd);
    }

    /// @inheritdoc IJobs
    function settle(Quote calldata quote, bytes32 resultHash, uint128 amount, bytes calldata signature) external {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        State state = found.state;
        if (state != State.Open && state != State.Submitted) revert Jobs_WrongState(jobId, job(jobId).state);
        if (amount > quote.amount) revert Jobs_OverAmount(jobId, quote.amount, amount);
        if (state == State.Open) {
            if (amount < quote.amount) revert Jobs_BelowClaimed(jobId, quote.amount, amount);
            if (uint256(resultHash) <= uint256(NO_RESULT)) revert Jobs_NoResult(jobId);
        } else {
            if (amount < found.claimed) revert Jobs_BelowClaimed(jobId, found.claimed, amount);
            if (bytes10(resultHash) != found.tag) revert Jobs_WrongResult(jobId, found.result, resultHash);
        }
        if (msg.sender != quote.client) {
            _requireSigner(jobId, quote.client, acceptanceDigest(jobId, resultHash, amount), signature);
        }

        _empty(found);
        if (state == State.Open) found.result = resultHash;

        _pay(jobId, quote, amount);
    }

    /// @inheritdoc IJobs
    function finalize(Quote calldata quote) external {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        if (found.state != State.Submitted) revert Jobs_WrongState(jobId, job(jobId).state);
        if (block.timestamp < found.windowEnd) revert Jobs_TooEarly(jobId, found.windowEnd, block.timestamp);

        uint128 claimed = found.claimed;
        _empty(found);

        _pay(jobId, quote, claimed);
    }

    /// @inheritdoc IJobs
    function refund(Quote calldata quote) external {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        if (found.state != State.Open) revert Jobs_WrongState(jobId, job(jobId).state);
        if (block.timestamp < quote.deadline) revert Jobs_TooEarly(jobId, quote.deadline, block.timestamp);

        _empty(found);

        emit Refunded(jobId);

        _giveBack(jobId, quote, quote.penalty, msg.sender);
    }

    /// @inheritdoc IJobs
    function fail(Quote calldata quote) external {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        State state = found.state;
        if (state != State.Open && state != State.Submitted) revert Jobs_WrongState(jobId, job(jobId).state);
        if (state == State.Open && block.timestamp >= quote.deadline) {
            revert Jobs_TooLate(jobId, quote.deadline, block.timestamp);
        }
        if (!_isWorker(quote, msg.sender)) revert Jobs_NotWorker(jobId, msg.sender);

        _empty(found);
        if (state == State.Submitted) found.result = NO_RESULT;

        emit Failed(jobId);

        uint128 penalty = state == State.Open ? quote.penalty / FAIL_DIVISOR : quote.penalty;
        _giveBack(jobId, quote, penalty, address(0));
    }

    /// @inheritdoc IJobs
    function dispute(Quote calldata quote) external onlyModule returns (Job memory) {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        if (found.state != State.Submitted) revert Jobs_WrongState(jobId, job(jobId).state);
        if (block.timestamp >= found.windowEnd) revert Jobs_TooLate(jobId, found.windowEnd, block.timestamp);

        found.state = State.Disputed;

        emit Disputed(jobId);

        return job(jobId);
    }

    /// @inheritdoc IJobs
    function resolve(Quote calldata quote, uint128 toWorker, bool penalize) external onlyModule {
        bytes32 jobId = jobIdOf(quote);
        Record storage found = _records[jobId];
        if (found.state != State.Disputed) revert Jobs_WrongState(jobId, job(jobId).state);
        if (toWorker > found.claimed) revert Jobs_OverAmount(jobId, found.claimed, toWorker);

        _empty(found);

        _pay(jobId, quote, toWorker);
        if (penalize) _slash(jobId, quote, quote.penalty, quote.client);
    }

    /// @inheritdoc IJobs
    function job(bytes32 jobId) public view returns (Job memory) {
        Record storage found = _records[jobId];
        (State state, bytes32 result) = (found.state, found.result);
        if (state == State.None && result != 0) state = result == NO_RESULT ? State.Refunded : State.Settled;
        if (result == NO_RESULT) result = 0;
        return Job(state, found.windowEnd, found.claimed, result);
    }

    /// @inheritdoc IJobs
    function jobIdOf(Quote calldata quote) public view returns (bytes32) {
        // keccak256(abi.encode(QUOTE_TYPE, quote)) without looking at each field: a quote with dirty bits has an id that
        // `open`, which reads all fields, never lets in.
        bytes32 typeHash = QUOTE_TYPE;
        bytes32 structHash;
        assembly ("memory-safe") {
            let free := mload(0x40)
            mstore(free, typeHash)
            calldatacopy(add(free, 0x20), quote, 0x160)
            structHash := keccak256(free, 0x180)
        }
        return _hashTypedDataV4(structHash);
    }

    /// @inheritdoc IJobs
    function orderDigest(bytes32 jobId) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(ORDER_TYPE, jobId)));
    }

    /// @inheritdoc IJobs
    function submissionDigest(bytes32 jobId, bytes32 resultHash, uint128 claimed) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(SUBMISSION_TYPE, jobId, resultHash, claimed)));
    }

    /// @inheritdoc IJobs
    function acceptanceDigest(bytes32 jobId, bytes32 resultHash, uint128 amount) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(ACCEPTANCE_TYPE, jobId, resultHash, amount)));
    }

    /// @inheritdoc IJobs
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    /// @dev The end of a job that is paid: `paid` to the worker's payout address, the rest to the client, the penalty free.
    function _pay(bytes32 jobId, Quote calldata quote, uint128 paid) private {
        address payout = workers.payoutOf(quote.worker);
        uint128 rest = quote.amount - paid;
        emit Settled(jobId, payout, paid);

        _letGo(quote);
        if (paid > 0) vault.release(quote.token, payout, paid);
        if (rest > 0) vault.release(quote.token, quote.client, rest);
    }

    /// @dev The end of a job that is not: everything to the client, and `penalty` out of the stake.
    function _giveBack(bytes32 jobId, Quote calldata quote, uint128 penalty, address reporter) private {
        _letGo(quote);
        _slash(jobId, quote, penalty, reporter);
        vault.release(quote.token, quote.client, quote.amount);
    }

    /// @dev All of the first slot at once.
    function _empty(Record storage found) private {
        assembly ("memory-safe") {
            sstore(found.slot, 0)
        }
    }

    function _letGo(Quote calldata quote) private {
        if (quote.penalty > 0) workers.letGo(quote.worker, quote.token, quote.penalty);
    }

    function _slash(bytes32 jobId, Quote calldata quote, uint128 amount, address reporter) private {
        if (amount > 0) workers.bookSlash(quote.worker, quote.token, amount, quote.client, reporter, jobId);
    }

    function _isWorker(Quote calldata quote, address account) private view returns (bool) {
        return account == quote.worker || account == workers.ownerOf(quote.worker);
    }

    function _requireSigner(bytes32 jobId, address signer, bytes32 digest, bytes calldata signature) private view {
        if (!signer.isValid(digest, signature)) revert Jobs_BadSignature(jobId, signer);
    }
}
