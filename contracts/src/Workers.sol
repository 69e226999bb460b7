// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {IVault} from "./interfaces/IVault.sol";
import {IWorkers} from "./interfaces/IWorkers.sol";

contract Workers is IWorkers, EIP712 {
    /// @dev IWorkers.Worker and the flag that retires for ever; the first four fields share a slot.
    struct Key {
        address owner;
        bool active;
        bool convicted;
        /// @dev By its owner; 0 while active.
        uint40 retiredAt;
        address payout;
        uint256 nonce;
    }

    /// @dev What recent earnings lock. `amount` is of `epoch`, `before` of the one before; both are void two epochs later.
    struct Earnings {
        uint32 epoch;
        uint112 amount;
        uint112 before;
    }

    bytes32 private constant HOT_KEY_TYPE =
        keccak256("HotKey(address owner,address hotKey,address payout,uint256 nonce,uint40 deadline)");
    bytes32 private constant GUARDIAN = keccak256("GUARDIAN");
    uint256 private constant PPM = 1_000_000;

    uint40 public constant UNBONDING = 52 days;
    uint40 public constant EARNINGS_WINDOW = 7 days;
    uint256 public constant EARNINGS_LOCK_PPM = 500_000;
    uint256 public constant SLASH_CAP_PPM = 500_000;
    uint40 public constant SLASH_DELAY = 7 days;
    uint256 public constant VICTIM_PPM = 500_000;
    uint256 public constant REPORTER_PPM = 250_000;
    /// @dev Nobody has its key: a vault balance there is gone.
    address public constant BURN = 0x000000000000000000000000000000000000dEaD;

    IVault public immutable vault;

    mapping(address hotKey => Key) private _keys;
    mapping(address hotKey => Capability) private _capabilities;
    mapping(address owner => mapping(address token => Stake)) private _stakes;
    mapping(address owner => mapping(address token => Earnings)) private _earnings;
    mapping(uint256 slashId => Slash) private _slashes;
    uint256 private _lastSlash;

    modifier onlyModule() {
        if (!vault.isModule(msg.sender)) revert Workers_NotModule(msg.sender);
        _;
    }

    constructor(IVault vault_) EIP712("Gristmill", "1") {
        if (address(vault_).code.length == 0) revert Workers_NotAContract(address(vault_));
        vault = vault_;
    }

    /// @inheritdoc IWorkers
    function register(address hotKey, address payout, uint40 deadline, bytes calldata signature) external {
        _activate(hotKey, payout, deadline, signature);
    }

    /// @inheritdoc IWorkers
    function setPayout(address hotKey, address payout) external {
        Key storage key = _owned(hotKey);
        if (payout == address(0)) revert Workers_ZeroAddress();

        address previous = key.payout;
        key.payout = payout;

        emit PayoutSet(hotKey, previous, payout);
    }

    /// @inheritdoc IWorkers
    function rotate(address hotKey, address newHotKey, uint40 deadline, bytes calldata signature) external {
        Key storage key = _ownedActive(hotKey);

        (key.active, key.retiredAt) = (false, uint40(block.timestamp));
        _activate(newHotKey, key.payout, deadline, signature);

        emit Rotated(hotKey, newHotKey, msg.sender);
    }

    /// @inheritdoc IWorkers
    function revoke(address hotKey) external {
        Key storage key = _ownedActive(hotKey);

        (key.active, key.retiredAt) = (false, uint40(block.timestamp));

        emit Revoked(hotKey, msg.sender);
    }

    /// @inheritdoc IWorkers
    function announce(address hotKey, bytes32 capability, uint64 version, uint40 validUntil, string calldata uri)
        external
    {
        Key storage key = _keys[hotKey];
        if (msg.sender != hotKey && msg.sender != key.owner) revert Workers_NotHotKeyOrOwner(hotKey, msg.sender);
        if (key.convicted) revert Workers_Convicted(hotKey);
        uint64 current = _capabilities[hotKey].version;
        if (version <= current) revert Workers_VersionNotHigher(hotKey, current, version);

        _capabilities[hotKey] = Capability(capability, version, validUntil);

        emit Announced(hotKey, capability, version, validUntil, uri);
    }

    /// @inheritdoc IWorkers
    function stake(address token, uint128 amount) external {
        if (amount == 0) revert Workers_ZeroAmount();

        _stakes[msg.sender][token].active += amount;

        emit Staked(msg.sender, token, amount);

        vault.lock(token, msg.sender, amount);
    }

    /// @inheritdoc IWorkers
    function unstake(address token, uint128 amount) external {
        if (amount == 0) revert Workers_ZeroAmount();
        Stake storage found = _stakes[msg.sender][token];
        uint128 active = found.active;
        if (amount > active) revert Workers_StakeTooLow(msg.sender, token, active, amount);

        uint40 freeAt = uint40(block.timestamp) + UNBONDING;
        found.active = active - amount;
        found.unbonding += amount;
        found.freeAt = freeAt;

        emit Unstaked(msg.sender, token, amount, freeAt);
    }

    /// @inheritdoc IWorkers
    function withdrawStake(address token) external returns (uint128 amount) {
        Stake storage found = _stakes[msg.sender][token];
        uint128 unbonding = found.unbonding;
        if (unbonding == 0) revert Workers_NothingFree(msg.sender, token);
        if (block.timestamp < found.freeAt) revert Workers_TooEarly(found.freeAt, block.timestamp);
        uint256 free = _free(msg.sender, token);
        amount = free < unbonding ? uint128(free) : unbonding;
        if (amount == 0) revert Workers_NothingFree(msg.sender, token);

        found.unbonding = unbonding - amount;

        emit StakeWithdrawn(msg.sender, token, amount);

        vault.release(token, msg.sender, amount);
    }

    /// @inheritdoc IWorkers
    function setExposure(address token, uint128 exposure) external {
        _stakes[msg.sender][token].exposure = exposure;

        emit ExposureSet(msg.sender, token, exposure);
    }

    /// @inheritdoc IWorkers
    function moveSlash(uint256 slashId) external {
        Slash storage found = _booked(slashId);
        if (block.timestamp < found.movesAt) revert Workers_TooEarly(found.movesAt, block.timestamp);

        found.state = SlashState.Moved;
        uint128 amount = found.amount;
        (address victim, address reporter, address token) = (found.victim, found.reporter, found.token);
        uint128 toVictim = victim == address(0) ? 0 : _share(amount, VICTIM_PPM);
        uint128 toReporter = reporter == address(0) ? 0 : _share(amount, REPORTER_PPM);
        uint128 burnt = amount - toVictim - toReporter;

        emit SlashMoved(slashId, toVictim, toReporter, burnt);

        if (toVictim > 0) vault.release(token, victim, toVictim);
        if (toReporter > 0) vault.release(token, reporter, toReporter);
        vault.release(token, BURN, burnt);
    }

    /// @inheritdoc IWorkers
    function cancelSlash(uint256 slashId) external {
        if (!IAccessControl(address(vault)).hasRole(GUARDIAN, msg.sender)) revert Workers_NotGuardian(msg.sender);
        Slash storage found = _booked(slashId);
        if (block.timestamp >= found.movesAt) revert Workers_TooLate(slashId, found.movesAt);

        found.state = SlashState.Cancelled;
        _stakes[found.owner][found.token].active += found.amount;

        emit SlashCancelled(slashId, msg.sender);
    }

    /// @inheritdoc IWorkers
    function lockForEarnings(address hotKey, address token, uint256 earned) external onlyModule {
        address owner = _keys[hotKey].owner;
        Stake storage found = _stakes[owner][token];
        // One look for the many that have no stake; the rest is read only where there is something to lock.
        if (found.active == 0 && found.unbonding == 0) return;
        Earnings memory known = _earningsNow(owner, token);
        // What jobs hold counts as free here: held for a moment by a job of one's own, it would be no lock.
        uint256 free = _above(uint256(found.active) + found.unbonding, uint256(known.amount) + known.before);

        // Every bound below keeps the arithmetic inside its type: a payment must not fail because of its size.
        uint256 amount = earned > type(uint128).max ? free : earned * EARNINGS_LOCK_PPM / PPM;
        if (amount > free) amount = free;
        uint256 room = type(uint112).max - known.amount;
        if (amount > room) amount = room;
        if (amount == 0) return;

        known.amount += uint112(amount);
        _earnings[owner][token] = known;

        emit EarningsLocked(owner, token, uint128(amount), known.epoch);
    }

    /// @inheritdoc IWorkers
    function hold(address hotKey, address token, uint128 amount) external onlyModule {
        Key storage key = _keys[hotKey];
        address owner = key.owner;
        if (owner == address(0)) revert Workers_NotActive(hotKey);
        if (key.convicted) revert Workers_Convicted(hotKey);
        Stake storage found = _stakes[owner][token];
        uint256 held = uint256(found.held) + amount;
        if (held > found.exposure) revert Workers_OverExposure(owner, token, found.exposure, held);
        uint256 free = _free(owner, token);
        if (amount > free) revert Workers_StakeTooLow(owner, token, free, amount);

        found.held = uint128(held);

        emit Held(owner, token, amount, uint128(held));
    }

    /// @inheritdoc IWorkers
    function letGo(address hotKey, address token, uint128 amount) external onlyModule {
        address owner = _keys[hotKey].owner;

        uint128 held = _stakes[owner][token].held - amount;
        _stakes[owner][token].held = held;

        emit LetGo(owner, token, amount, held);
    }

    /// @inheritdoc IWorkers
    function bookSlash(
        address hotKey,
        address token,
        uint128 amount,
        address victim,
        address reporter,
        bytes32 cause
    ) external onlyModule returns (uint256 slashId, uint128 booked) {
        Key storage key = _keys[hotKey];
        // As long as a stake answers after it began to leave; the signatures of a key that is long gone are a thief's.
        if (key.retiredAt != 0 && block.timestamp > key.retiredAt + UNBONDING) return (0, 0);
        address owner = key.owner;
        booked = _take(owner, token, amount);
        if (booked == 0) return (0, 0);
        // Used up, or a thief of the key would lose it again and again.
        Stake storage found = _stakes[owner][token];
        found.exposure = uint128(_above(found.exposure, booked));

        slashId = ++_lastSlash;
        Slash memory made = Slash(
            owner, token, booked, victim, reporter, uint40(block.timestamp) + SLASH_DELAY, SlashState.Booked, cause
        );
        _slashes[slashId] = made;

        emit SlashBooked(slashId, owner, token, booked, victim, reporter, made.movesAt, cause);
    }

    /// @inheritdoc IWorkers
    function convict(address hotKey, bytes32 cause) external onlyModule returns (bool first) {
        Key storage key = _keys[hotKey];
        if (key.convicted) return false;

        key.convicted = true;
        key.active = false;

        emit Convicted(hotKey, key.owner, cause);
        return true;
    }

    /// @inheritdoc IWorkers
    function stakeOf(address owner, address token) external view returns (Stake memory) {
        return _stakes[owner][token];
    }

    /// @inheritdoc IWorkers
    function lockedStake(address owner, address token) external view returns (uint256) {
        return _locked(owner, token);
    }

    /// @inheritdoc IWorkers
    function slash(uint256 slashId) external view returns (Slash memory) {
        return _slashes[slashId];
    }

    /// @inheritdoc IWorkers
    function capabilityOf(address hotKey) external view returns (Capability memory) {
        return _capabilities[hotKey];
    }

    /// @inheritdoc IWorkers
    function isConvicted(address hotKey) external view returns (bool) {
        return _keys[hotKey].convicted;
    }

    /// @inheritdoc IWorkers
    function isRetired(address hotKey) external view returns (bool) {
        Key storage key = _keys[hotKey];
        return key.convicted || (key.owner != address(0) && !key.active);
    }

    /// @inheritdoc IWorkers
    function payoutOf(address hotKey) external view returns (address) {
        address payout = _keys[hotKey].payout;
        return payout == address(0) ? hotKey : payout;
    }

    /// @inheritdoc IWorkers
    function ownerOf(address hotKey) external view returns (address) {
        return _keys[hotKey].owner;
    }

    /// @inheritdoc IWorkers
    function isActive(address hotKey) external view returns (bool) {
        return _keys[hotKey].active;
    }

    /// @inheritdoc IWorkers
    function worker(address hotKey) external view returns (Worker memory) {
        Key storage key = _keys[hotKey];
        return Worker(key.owner, key.active, key.payout, key.nonce);
    }

    /// @inheritdoc IWorkers
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    /// @inheritdoc IWorkers
    function hotKeyDigest(address owner, address hotKey, address payout, uint256 nonce, uint40 deadline)
        public
        view
        returns (bytes32)
    {
        return _hashTypedDataV4(keccak256(abi.encode(HOT_KEY_TYPE, owner, hotKey, payout, nonce, deadline)));
    }

    function _activate(address hotKey, address payout, uint40 deadline, bytes calldata signature) private {
        if (payout == address(0)) revert Workers_ZeroAddress();
        if (block.timestamp >= deadline) revert Workers_Expired(deadline, block.timestamp);
        Key storage key = _keys[hotKey];
        if (key.convicted) revert Workers_Convicted(hotKey);
        if (key.active || (key.owner != address(0) && key.owner != msg.sender)) {
            revert Workers_HotKeyTaken(hotKey, key.owner);
        }
        bytes32 digest = hotKeyDigest(msg.sender, hotKey, payout, key.nonce, deadline);
        (address recovered, ECDSA.RecoverError error_,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (error_ != ECDSA.RecoverError.NoError || recovered != hotKey) revert Workers_BadSignature(hotKey);

        key.owner = msg.sender;
        key.active = true;
        key.retiredAt = 0;
        key.payout = payout;
        key.nonce += 1;

        emit Registered(hotKey, msg.sender, payout);
    }

    function _owned(address hotKey) private view returns (Key storage key) {
        key = _keys[hotKey];
        if (key.owner != msg.sender) revert Workers_NotOwner(hotKey, msg.sender);
    }

    function _ownedActive(address hotKey) private view returns (Key storage key) {
        key = _owned(hotKey);
        if (!key.active) revert Workers_NotActive(hotKey);
    }

    /// @dev Takes at most `amount` and the cap out of the stake: the part on its way out first, so that leaving is no shelter.
    function _take(address owner, address token, uint128 amount) private returns (uint128 taken) {
        Stake storage found = _stakes[owner][token];
        (uint128 active, uint128 unbonding) = (found.active, found.unbonding);
        uint256 cap = (uint256(active) + unbonding) * SLASH_CAP_PPM / PPM;
        taken = amount < cap ? amount : uint128(cap);
        uint128 leaving = taken < unbonding ? taken : unbonding;

        found.unbonding = unbonding - leaving;
        found.active = active - (taken - leaving);
    }

    function _booked(uint256 slashId) private view returns (Slash storage found) {
        found = _slashes[slashId];
        if (found.state != SlashState.Booked) revert Workers_NotBooked(slashId);
    }

    /// @dev As if the epoch had been turned over now.
    function _earningsNow(address owner, address token) private view returns (Earnings memory known) {
        known = _earnings[owner][token];
        uint32 epoch = uint32(block.timestamp / EARNINGS_WINDOW);
        if (known.epoch == epoch) return known;
        return Earnings(epoch, 0, known.epoch + 1 == epoch ? known.amount : 0);
    }

    function _locked(address owner, address token) private view returns (uint256) {
        Earnings memory known = _earningsNow(owner, token);
        return uint256(_stakes[owner][token].held) + known.amount + known.before;
    }

    /// @dev A slash may leave less stake than is locked; then nothing is free.
    function _free(address owner, address token) private view returns (uint256) {
        Stake storage found = _stakes[owner][token];
        return _above(uint256(found.active) + found.unbonding, _locked(owner, token));
    }

    function _above(uint256 all, uint256 part) private pure returns (uint256) {
        return all > part ? all - part : 0;
    }

    function _share(uint128 amount, uint256 ppm) private pure returns (uint128) {
        return uint128(uint256(amount) * ppm / PPM);
    }
}
